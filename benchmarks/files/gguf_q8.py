"""GGUF files with Q8_0 weights for llama.cpp, by gguf's own quantiser."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import gguf
import numpy as np
from safetensors.numpy import load_file

from benchmarks.files import gpt2

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

_Q8_0: Final = gguf.GGMLQuantizationType.Q8_0
_GPT2_NAMES: Final = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def requantise(source: Path, out: Path) -> None:
    """Write ``source`` with every quantised matrix dequantised and quantised to Q8_0; the rest stays as it is."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, str(reader.fields["general.architecture"].contents()))
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        _add(writer, tensor.name, values, matrix=tensor.tensor_type != gguf.GGMLQuantizationType.F32)
    _write(writer)


def write_gpt2(checkpoint: Path, out: Path) -> None:
    """Write the GPT-2-shaped checkpoint; norms, biases and positions stay float32, as llama.cpp's converter does it."""
    writer = gguf.GGUFWriter(out, "gpt2")
    writer.add_context_length(gpt2.CONTEXT)
    writer.add_embedding_length(gpt2.WIDTH)
    writer.add_feed_forward_length(4 * gpt2.WIDTH)
    writer.add_block_count(gpt2.LAYERS)
    writer.add_head_count(gpt2.HEADS)
    writer.add_layer_norm_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    _add_tokenizer(writer, json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))["model"])
    weights = load_file(checkpoint / "model.safetensors")
    for name, values in weights.items():
        stem, _, part = name.removeprefix("transformer.").rpartition(".")
        if stem == "wte":
            _add(writer, "token_embd.weight", values, matrix=True)
        elif stem == "wpe":
            _add(writer, "position_embd.weight", values, matrix=False)
        elif stem == "ln_f":
            _add(writer, f"output_norm.{part}", values, matrix=False)
        else:
            _, layer, module = stem.split(".", 2)
            # A Conv1D holds its matrix the other way round than GGUF does.
            _add(writer, f"blk.{layer}.{_GPT2_NAMES[module]}.{part}", values.T, matrix=values.ndim == 2)
    _write(writer)


def _add_tokenizer(writer: gguf.GGUFWriter, bpe: dict[str, Any]) -> None:
    vocab: dict[str, int] = bpe["vocab"]
    tokens = [*sorted(vocab, key=vocab.__getitem__), gpt2.END_OF_TEXT]
    normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([control if token == gpt2.END_OF_TEXT else normal for token in tokens])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]])
    writer.add_eos_token_id(gpt2.END_OF_TEXT_ID)


def _add(writer: gguf.GGUFWriter, name: str, values: NDArray[np.float32], *, matrix: bool) -> None:
    values = np.ascontiguousarray(values, np.float32)
    if matrix:
        writer.add_tensor(name, gguf.quantize(values, _Q8_0), raw_dtype=_Q8_0)
    else:
        writer.add_tensor(name, values)


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
