"""Small graphs of every target, as they are built."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from edge_llm.bundle.manifest import ModelDims
from export.checkpoints import load_checkpoint
from export.graph.weights import CPU_FP32, WeightFormat, cpu_int8, cuda
from export.graphs import build_graph
from tests.export.models import gpt2_config, llama_config, random_model, save

CONTEXT = 64
FORMATS: dict[str, WeightFormat] = {format.target: format for format in (cpu_int8(), CPU_FP32, cuda())}
CONFIGS = {
    "gpt2": gpt2_config,
    "gpt2-untied": lambda: gpt2_config(n_head=5, n_embd=80, tie_word_embeddings=False),
    "llama": llama_config,
    "llama-untied-biases": lambda: llama_config(tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
}


class Built:
    """Graphs of one checkpoint, each built when it is first asked for."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.folder = folder
        self.model = random_model(CONFIGS[kind]())
        self.checkpoint = load_checkpoint(str(save(self.model, folder / "model")))
        self.dims: ModelDims = self.checkpoint.architecture.dims(CONTEXT)

    def path(self, target: str) -> Path:
        folder = self.folder / target
        if not folder.exists():
            build_graph(self.checkpoint, FORMATS[target], self.dims, folder)
        return folder / "model.onnx"

    def proto(self, target: str) -> onnx.ModelProto:
        return onnx.load(str(self.path(target)), load_external_data=False)


@pytest.fixture(scope="package")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Built]:
    """``built(kind)``: the graphs of one of ``CONFIGS``."""
    made: dict[str, Built] = {}

    def get(kind: str) -> Built:
        if kind not in made:
            made[kind] = Built(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return get
