"""Bundles made by this project's export, prepared for this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from benchmarks.files.cache import built, remove_others, run_module, source_key
from benchmarks.files.gpt2 import write_checkpoint
from edge_llm.bundle.manifest import Bundle
from edge_llm.bundle.prepare import prepared_graph

_ROOT: Final = Path(__file__).parent.parent.parent
TARGET: Final = "cpu-int8"
SMOLLM2_ALIAS: Final = "smollm2-135m-instruct"


def gpt2_checkpoint(cache_dir: Path) -> Path:
    """The folder of the GPT-2-shaped checkpoint."""
    writer = source_key(Path(__file__).parent / "gpt2.py")
    path = built(cache_dir / "gpt2-124m" / f"checkpoint-{writer}", write_checkpoint)
    remove_others(path, "checkpoint-")
    return path


def gpt2_bundle(cache_dir: Path) -> Path:
    """The int8 bundle of that checkpoint, with its prepared copy beside it (``cache_dir`` of the runtime)."""
    checkpoint = gpt2_checkpoint(cache_dir)
    made_from = checkpoint.name.removeprefix("checkpoint-")
    # Random weights predict nothing, so the ratio of two perplexities is chance.
    return _bundle(checkpoint.parent, "gpt2-124m", str(checkpoint), made_from, "--max-perplexity-ratio", "1.1")


def smollm2_bundle(cache_dir: Path, context: int) -> Path:
    """The int8 bundle of SmolLM2-135M-Instruct with a cache of ``context`` positions."""
    return _bundle(cache_dir / "smollm2-135m", "smollm2-135m", SMOLLM2_ALIAS, f"{context}", "--context", f"{context}")


def _bundle(folder: Path, name: str, model: str, made_from: str, *options: str) -> Path:
    # Another exporter may build another graph.
    schema = _ROOT / "edge_llm" / "bundle"
    exporter = source_key(_ROOT / "export", schema / "manifest.py", schema / "graph_io.py")
    arguments = ("--target", TARGET, "--name", name, *options)
    path = built(
        folder / f"bundle-{made_from}-{exporter}",
        lambda out: run_module("export", "bundle", model, "--out", out, *arguments),
    )
    remove_others(path, "bundle-")
    prepared_graph(Bundle.open(path), TARGET, folder)
    return path
