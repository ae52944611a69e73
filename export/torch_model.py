"""A transformers model of a loaded checkpoint's weights, wherever they came from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from export.architectures.gpt2 import Gpt2Config
from export.architectures.llama import LlamaConfig

if TYPE_CHECKING:
    from export.checkpoint import Checkpoint
    from export.tensors import Float32Array


def model_from_tensors(checkpoint: Checkpoint) -> Any:
    """Build the model; transformers' own reader of GGUF would want one more package."""
    import torch
    import transformers

    architecture = checkpoint.architecture
    if isinstance(architecture, Gpt2Config):
        prefix, model = "transformer.", transformers.GPT2LMHeadModel(_gpt2_config(architecture))
    else:
        assert isinstance(architecture, LlamaConfig)
        prefix, model = "model.", transformers.LlamaForCausalLM(_llama_config(architecture))
        frequencies = architecture.inverse_frequencies(checkpoint.tensors)
        model.model.rotary_emb.inv_freq = torch.from_numpy(frequencies)
    state = {}
    for name in checkpoint.tensors.shapes:
        values = checkpoint.tensors.read(name)
        if isinstance(architecture, LlamaConfig) and architecture.rotary_interleaved:
            values = _half_split(name, values, architecture)
        state[name if name.startswith("lm_head") else prefix + name] = torch.from_numpy(values)
    missing = [
        name for name in model.load_state_dict(state, strict=False).missing_keys if not name.startswith("lm_head")
    ]
    for name in missing:
        # transformers gives the output projection a bias with those of Q, K and V; the checkpoint has none.
        torch.nn.init.zeros_(model.get_parameter(name))
    return model


def _gpt2_config(config: Gpt2Config) -> Any:
    import transformers

    return transformers.GPT2Config(
        n_layer=config.num_layers,
        n_head=config.num_heads,
        n_embd=config.hidden_size,
        n_inner=config.inner_size,
        n_positions=config.context_length,
        vocab_size=config.vocab_size,
        layer_norm_epsilon=config.layer_norm_epsilon,
        activation_function=config.activation,
        tie_word_embeddings=config.tied,
        attn_implementation="eager",
    )


def _llama_config(config: LlamaConfig) -> Any:
    import transformers

    return transformers.LlamaConfig(
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        hidden_size=config.hidden_size,
        intermediate_size=config.inner_size,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.context_length,
        rms_norm_eps=config.rms_norm_eps,
        attention_bias=bool(config.biased),
        tie_word_embeddings=config.tied,
        attn_implementation="eager",
    )


def _half_split(name: str, values: Float32Array, config: LlamaConfig) -> Float32Array:
    """Q and K rows of a GGUF in the order of Hugging Face: first halves of the rotated pairs, then second halves."""
    if ".q_proj." not in name and ".k_proj." not in name:
        return values
    pairs = values.reshape(-1, config.head_dim // 2, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(values.shape))
