"""Writing small GGUFs as llama.cpp's converter lays them out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from tests.export.models import tokenizer_json
from tests.generate_tiny_bundle import CHAT_TEMPLATE

Q8_0 = gguf.GGMLQuantizationType.Q8_0
Arrays = dict[str, NDArray[np.float32]]
LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
}
TOP_NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "lm_head": "output",
}


def interleave(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """llama.cpp's permutation of Q and K rows: the two values of a rotated pair become neighbours."""
    split = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(rows.shape))


def gguf_arrays(model: Any, architecture: str) -> Arrays:
    """A transformers model's weights under GGUF names and in GGUF order."""
    config = model.config
    arrays: Arrays = {}
    for full_name, tensor in model.state_dict().items():
        name = full_name.removeprefix("model.").removeprefix("transformer.")
        values = tensor.float().numpy()
        stem, part = name.rsplit(".", 1)
        if stem == "lm_head" and config.tie_word_embeddings:
            continue
        if architecture == "gpt2" and stem.startswith("h.") and values.ndim == 2:
            values = np.ascontiguousarray(values.T)
        if architecture == "llama" and stem.endswith("q_proj"):
            values = interleave(values, config.num_attention_heads)
        if architecture == "llama" and stem.endswith("k_proj"):
            values = interleave(values, config.num_key_value_heads)
        if stem in TOP_NAMES:
            arrays[f"{TOP_NAMES[stem]}.{part}"] = values
        else:
            _, layer, inner = stem.split(".", 2)
            arrays[f"blk.{layer}.{LAYER_NAMES[inner]}.{part}"] = values
    return arrays


def write_gguf(
    path: Path,
    model: Any,
    architecture: str,
    *,
    matrix_type: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    pre: str = "gpt-2",
    tokenizer: str = "gpt2",
    extra: dict[str, tuple[NDArray[Any], gguf.GGMLQuantizationType]] | None = None,
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    config = model.config
    if architecture == "gpt2":
        writer.add_block_count(config.n_layer)
        writer.add_context_length(config.n_positions)
        writer.add_embedding_length(config.n_embd)
        writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
        writer.add_head_count(config.n_head)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_theta)
    writer.add_license("apache-2.0")
    _add_tokenizer(writer, pre, tokenizer)
    for name, values in gguf_arrays(model, architecture).items():
        if values.ndim == 2 and matrix_type != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, gguf.quantize(values, matrix_type), raw_dtype=matrix_type)
        else:
            writer.add_tensor(name, values)
    for name, (values, kind) in (extra or {}).items():
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: gguf.GGUFWriter, pre: str, kind: str) -> None:
    content = json.loads(tokenizer_json())
    vocab = content["model"]["vocab"]
    specials = {entry["content"] for entry in content["added_tokens"]}
    tokens = sorted(vocab, key=lambda token: vocab[token])
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in specials else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
