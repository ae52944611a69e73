"""Random checkpoints with weights large enough that a wrong detail shows in the logits."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from tests.generate_tiny_bundle import CHAT_TEMPLATE, train_tokenizer

VOCAB_SIZE = 400


@functools.cache
def tokenizer_json() -> str:
    return train_tokenizer(VOCAB_SIZE)


def gpt2_config(**changes: Any) -> Any:
    import transformers

    settings: dict[str, Any] = {
        "n_layer": 2,
        "n_head": 3,
        "n_embd": 48,
        "n_positions": 96,
        "vocab_size": VOCAB_SIZE,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return transformers.GPT2Config(**(settings | changes))


def llama_config(**changes: Any) -> Any:
    import transformers

    settings: dict[str, Any] = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "max_position_embeddings": 96,
        "vocab_size": VOCAB_SIZE,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
    }
    kind = changes.pop("kind", transformers.LlamaConfig)
    return kind(**(settings | changes))


def random_model(config: Any, seed: int = 0) -> Any:
    """A transformers model with every weight random, biases and norms included."""
    import torch
    import transformers

    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0 if name.endswith("weight") else 0.0, 0.2)
            else:
                parameter.normal_(0.0, 0.12)
    return model.eval()


def save(model: Any, folder: Path, *, chat: bool = True, **options: Any) -> Path:
    """Write model and tokenizer as ``save_pretrained`` does."""
    import transformers

    model.save_pretrained(folder, **options)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(), bos_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def save_gpt2(folder: Path, **changes: Any) -> Path:
    return save(random_model(gpt2_config(**changes)), folder)


def save_llama(folder: Path, **changes: Any) -> Path:
    return save(random_model(llama_config(**changes)), folder)


def random_ids(count: int, seed: int = 1) -> list[int]:
    return [int(token_id) for token_id in np.random.default_rng(seed).integers(3, VOCAB_SIZE, count)]


def _tokenizer() -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(tokenizer_json())
