"""A checkpoint with the shape of GPT-2 124M and random weights, as ``transformers`` saves one.

GPT-2's own weights are not needed: no engine's time depends on the values. They are scaled so that the logits are as
spread as a trained model's and every engine chooses the same tokens, which shows that all of them compute the same.
"""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Final

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

LAYERS: Final = 12
HEADS: Final = 12
WIDTH: Final = 768
VOCAB_SIZE: Final = 50257
CONTEXT: Final = 1024
END_OF_TEXT: Final = "<|endoftext|>"
END_OF_TEXT_ID: Final = VOCAB_SIZE - 1
# GPT-2's initialisation, with smaller biases: they add the same to every position, and one token would win everywhere.
_WEIGHT_STD: Final = 0.02
_BIAS_STD: Final = 0.002
# With this gain of the last norm the logits have a standard deviation of about 2.
_FINAL_GAIN: Final = 4.0
_SEED: Final = 20190214


def write_checkpoint(folder: Path) -> None:
    """Write config.json, model.safetensors and a tokenizer of GPT-2's size."""
    folder.mkdir()
    save_file(_weights(), folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_embd": WIDTH,
        "n_positions": CONTEXT,
        "n_ctx": CONTEXT,
        "vocab_size": VOCAB_SIZE,
        "layer_norm_epsilon": 1e-5,
        "bos_token_id": END_OF_TEXT_ID,
        "eos_token_id": END_OF_TEXT_ID,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tokenizer_json(VOCAB_SIZE).save(str(folder / "tokenizer.json"))
    special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
    settings = {"tokenizer_class": "GPT2TokenizerFast", "model_max_length": CONTEXT, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def tokenizer_json(vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer like GPT-2's: 256 bytes, made-up merges, one special token.

    Its merges are random joins of letters, so it parses, encodes and takes memory as a trained one does. Nearly every
    token is whole characters of ASCII, so text streams without waiting for the rest of a character.
    """
    rng = random.Random(_SEED)
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    heads = ["Ġ", *(chr(code) for code in range(ord("a"), ord("z") + 1))]
    tails = heads[1:]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges: list[tuple[str, str]] = []
    while len(vocab) < vocab_size - 1:
        left, right = rng.choice(heads), rng.choice(tails)
        joined = left + right
        if joined in vocab or len(joined) > 10:
            continue
        vocab[joined] = len(vocab)
        merges.append((left, right))
        heads.append(joined)
        if not joined.startswith("Ġ"):
            tails.append(joined)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return tokenizer


def _weights() -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(_SEED)

    def normal(*shape: int, std: float = _WEIGHT_STD) -> NDArray[np.float32]:
        values: NDArray[np.float32] = rng.standard_normal(shape, np.float32) * np.float32(std)
        return values

    def norm_gain(scale: float = 1.0) -> NDArray[np.float32]:
        values: NDArray[np.float32] = np.float32(scale) * (1 + normal(WIDTH, std=0.1))
        return values

    embedding = normal(VOCAB_SIZE, WIDTH)
    # Its logit stays near 0 and is never the highest, so no answer ends before its limit.
    embedding[END_OF_TEXT_ID] *= np.float32(1e-3)
    weights = {
        "wte.weight": embedding,
        "wpe.weight": normal(CONTEXT, WIDTH, std=0.01),
        "ln_f.weight": norm_gain(_FINAL_GAIN),
        "ln_f.bias": normal(WIDTH, std=_BIAS_STD),
    }
    # Attention averages over the prompt and so changes little from token to token: it counts less than the MLP.
    attention_std = _WEIGHT_STD / (2 * LAYERS) ** 0.5
    for layer in range(LAYERS):
        prefix = f"h.{layer}"
        for norm in ("ln_1", "ln_2"):
            weights[f"{prefix}.{norm}.weight"] = norm_gain()
            weights[f"{prefix}.{norm}.bias"] = normal(WIDTH, std=_BIAS_STD)
        for name, rows, columns, std in (
            ("attn.c_attn", WIDTH, 3 * WIDTH, _WEIGHT_STD),
            ("attn.c_proj", WIDTH, WIDTH, attention_std),
            ("mlp.c_fc", WIDTH, 4 * WIDTH, _WEIGHT_STD),
            ("mlp.c_proj", 4 * WIDTH, WIDTH, _WEIGHT_STD),
        ):
            matrix = normal(rows, columns, std=std)
            if name == "mlp.c_proj":
                # GELU's positive mean would add the same vector to every position too.
                matrix -= matrix.mean(axis=0)
            weights[f"{prefix}.{name}.weight"] = matrix
            weights[f"{prefix}.{name}.bias"] = normal(columns, std=_BIAS_STD)
    return {f"transformer.{name}": array for name, array in weights.items()}
