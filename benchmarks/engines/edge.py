"""This runtime: a bundle's prepared copy through the engine that serves queries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnxruntime as ort

from edge_llm import __version__
from edge_llm.bundle.manifest import Bundle
from edge_llm.config import Config, EngineConfig
from edge_llm.engine.loading import load_model
from edge_llm.engine.sampler import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from benchmarks.engines import OnToken


class EdgeEngine:
    """The engine with one slot."""

    def __init__(self, path: Path, threads: int) -> None:
        config = Config(bundle=str(path), cache_dir=str(path.parent), engine=EngineConfig(threads=threads, slots=1))
        self.version = f"{__version__}, onnxruntime {ort.__version__}"
        self._engine = load_model(Bundle.open(path), config).engine

    def generate(self, prompt_ids: Sequence[int], count: int, on_token: OnToken) -> None:
        """Prefill, then decode."""
        state = self._engine.start(prompt_ids, SamplingParams(), count)
        state.stop_token_ids = frozenset()  # an end of text would end the measurement
        try:
            while not state.prefilled:
                self._engine.prefill(state)
            on_token(state.output_ids[-1])
            while not state.finished:
                self._engine.decode([state])
                on_token(state.output_ids[-1])
        finally:
            self._engine.release(state)


def load(path: Path, threads: int, context: int) -> EdgeEngine:  # noqa: ARG001 - the bundle states its context
    """Load a bundle folder; prepared copies lie beside it."""
    return EdgeEngine(path, threads)
