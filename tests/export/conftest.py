"""Small checkpoints as transformers saves them, and a tokenizer for them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

# The tests compare our numbers with torch's on the same two cores; neither may ask the network for anything.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from tests.export.models import save_gpt2, save_llama, tokenizer_json


@pytest.fixture(scope="session")
def tokenizer_text() -> str:
    """tokenizer.json of a byte-level BPE with 400 tokens and the special tokens of ChatML."""
    return tokenizer_json()


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of 2 layers, hidden 48, 3 heads."""
    return save_gpt2(tmp_path_factory.mktemp("gpt2") / "little-gpt2")


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 2 layers, hidden 64, 4 heads over 2 key-value heads."""
    return save_llama(tmp_path_factory.mktemp("llama") / "little-llama")


@pytest.fixture
def short_text(tmp_path: Path) -> Path:
    """A verification text that takes a fraction of a second."""
    path = tmp_path / "text.txt"
    path.write_text("A small text, long enough to compare two graphs of a small model. " * 8, encoding="utf-8")
    return path


@pytest.fixture
def export_command(tmp_path: Path, short_text: Path) -> Callable[..., tuple[int, Path]]:
    """Runs ``bundle MODEL --out OUT`` with a short text; returns the exit status and OUT."""
    from export.cli import main

    def run(model: str | Path, *flags: str) -> tuple[int, Path]:
        out = tmp_path / "work" / "bundle"
        arguments = ["bundle", str(model), "--out", str(out), "--verify-text", str(short_text)]
        return main([*arguments, "--max-perplexity-ratio", "1.1", *flags]), out

    return run
