"""optimum-onnx: the ONNX export of a transformers model with dynamically quantised int8 weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnxruntime as ort
import torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from benchmarks.engines.hf import generate_with
from benchmarks.machine import version_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from benchmarks.engines import OnToken


class OptimumEngine:
    """``ORTModelForCausalLM`` with its key-value cache and IO binding."""

    version = f"{version_of('optimum-onnx')}, onnxruntime {ort.__version__}"

    def __init__(self, path: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        self._model = ORTModelForCausalLM.from_pretrained(
            path,
            file_name="model_quantized.onnx",
            provider="CPUExecutionProvider",
            session_options=options,
            use_cache=True,
            use_io_binding=True,
        )

    def generate(self, prompt_ids: Sequence[int], count: int, on_token: OnToken) -> None:
        """The forward pass in a bare loop, which is faster than ``model.generate``."""
        generate_with(self._model, prompt_ids, count, on_token)


class OptimumGenerateEngine(OptimumEngine):
    """The same with ``model.generate``, which is what its users call."""

    def generate(self, prompt_ids: Sequence[int], count: int, on_token: OnToken) -> None:
        """Greedy search, each token reported by a streamer."""
        input_ids = torch.tensor([list(prompt_ids)])
        self._model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            streamer=_Streamer(on_token),
        )


class _Streamer(BaseStreamer):  # type: ignore[misc]  # transformers is not typed
    """Passes tokens on; the first call holds the prompt."""

    def __init__(self, on_token: OnToken) -> None:
        self._on_token = on_token
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self._on_token(int(value))
        self._prompt_seen = True

    def end(self) -> None:
        pass


def load(path: Path, threads: int, context: int) -> OptimumEngine:  # noqa: ARG001 - its cache grows
    """Load a folder that has been exported and quantised."""
    return OptimumEngine(path, threads)


def load_generate(path: Path, threads: int, context: int) -> OptimumEngine:  # noqa: ARG001 - its cache grows
    """The same, to be run with ``model.generate``."""
    return OptimumGenerateEngine(path, threads)
