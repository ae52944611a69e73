"""Writes tests/data/tiny_bundle: a random GPT-2 small enough to commit, so most tests need no torch and no network.

    python -m tests.generate_tiny_bundle [OUT]

It speaks nonsense, in whole and broken UTF-8, but through the real exporter, graphs, tokenizer and chat template.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from edge_llm.bundle.manifest import GenerationDefaults, Manifest
from export.architectures.gpt2 import Gpt2Config
from export.checkpoint import ChatSettings, Checkpoint
from export.graph.weights import CPU_FP32, cpu_int8
from export.pipeline import ExportOptions, export_checkpoint
from export.tensors import MemoryTensors
from export.verify import DEFAULT_TEXT
from tests.paths import TINY_BUNDLE

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Characters of two to four bytes, often enough that some of them become tokens of their own.
MULTIBYTE_TEXT = "Grüße aus Zürich, café crème, 你好世界 你好, привет мир, 🙂🚗🙂 20 °C → 68 °F. " * 20
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a tiny test model<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(vocab_size: int) -> str:
    """tokenizer.json of a byte-level BPE with the special tokens at ids 0 to 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
    )
    texts = [DEFAULT_TEXT.read_text(encoding="utf-8"), MULTIBYTE_TEXT]
    tokenizer.train_from_iterator(texts, trainer)
    return str(tokenizer.to_str())


def random_gpt2(config: Gpt2Config, seed: int) -> dict[str, NDArray[np.float32]]:
    """Weights that make the greedy answer wander: strong positions and attention, a weak pull to repeat."""
    rng = np.random.default_rng(seed)
    arrays: dict[str, NDArray[np.float32]] = {}
    for name, shape in config.required_shapes().items():
        values = rng.standard_normal(shape).astype(np.float32)
        if name.startswith("wpe"):
            arrays[name] = values
        elif name.startswith("wte"):
            arrays[name] = values * np.float32(0.5)
        elif len(shape) == 2:
            arrays[name] = values * np.float32(1.5 / shape[0] ** 0.5)
        elif ".ln_" in name or name.startswith("ln_f"):
            arrays[name] = (1 if name.endswith("weight") else 0) + values * np.float32(0.1)
        else:
            arrays[name] = values * np.float32(0.1)
    # A longer row is likelier to win: some answers end by themselves.
    arrays["wte.weight"][SPECIAL_TOKENS.index("<|im_end|>")] *= 1.7
    return arrays


def random_checkpoint(
    *, num_layers: int, num_heads: int, hidden_size: int, context_length: int, seed: int = 11, endless: bool = False
) -> Checkpoint:
    """A GPT-2 in memory. ``endless``: no token ends its answers."""
    config = Gpt2Config(
        num_layers=num_layers,
        num_heads=num_heads,
        hidden_size=hidden_size,
        inner_size=4 * hidden_size,
        vocab_size=512,
        context_length=context_length,
        layer_norm_epsilon=1e-5,
        activation="gelu_new",
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        tied=True,
    )
    arrays = random_gpt2(config, seed)
    if endless:
        # A row of zeros always scores 0, and the best of the others never does.
        arrays["wte.weight"][:3] = 0
    return Checkpoint(
        name="tiny",
        source="tests/generate_tiny_bundle.py",
        reference="random float32 weights",
        license="Apache-2.0",
        architecture=config,
        tensors=MemoryTensors(arrays),
        tokenizer_json=train_tokenizer(config.vocab_size),
        chat=ChatSettings(template=CHAT_TEMPLATE, bos_token=SPECIAL_TOKENS[0], eos_token=SPECIAL_TOKENS[2]),
        eos_token_ids=(2,),
        generation=GenerationDefaults(max_tokens=32),
    )


def tiny_checkpoint(seed: int = 11) -> Checkpoint:
    """The committed bundle's: 2 layers, hidden 32, 4 heads of 8, 256 positions."""
    return random_checkpoint(num_layers=2, num_heads=4, hidden_size=32, context_length=256, seed=seed)


def write_bundle(checkpoint: Checkpoint, out: Path, max_perplexity_ratio: float = 1.05) -> Manifest:
    """Export to ``out``, which must not exist."""
    # The same folder byte for byte, whenever it is made.
    os.environ.setdefault("SOURCE_DATE_EPOCH", "0")
    options = ExportOptions(
        out=out,
        targets=(cpu_int8(), CPU_FP32),
        verify_text=DEFAULT_TEXT,
        max_perplexity_ratio=max_perplexity_ratio,
    )
    return export_checkpoint(checkpoint, options)


def generate(out: Path, seed: int = 11) -> Manifest:
    """Write the tiny bundle to ``out``, which must not exist."""
    return write_bundle(tiny_checkpoint(seed), out)


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else TINY_BUNDLE)
