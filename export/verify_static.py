"""Judging a static form, whose graphs compute one token's logits a run, on whole texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import onnx

from edge_llm.bundle import graph_io
from edge_llm.engine.static_runner import StaticPaths, StaticRunner
from export.graph.builder import PREFILL_FILE

if TYPE_CHECKING:
    from pathlib import Path

    from edge_llm.bundle.manifest import ModelDims
    from export.graph.weights import WeightFormat

UNTESTED_NOTE: Final = "not run on hardware: the graphs ran on onnxruntime's CPU provider, never on TensorRT"


def static_paths(graph_path: Path) -> StaticPaths:
    """The graphs of a static form, of which ``graph_path`` is the one that decodes."""
    return StaticPaths(graph_path, graph_path.with_name(PREFILL_FILE))


def open_for_texts(graph_path: Path, dims: ModelDims, weights: WeightFormat) -> StaticRunner:
    """A runner whose prefill graph computes the logits of a whole chunk, where the shipped one has those of one token.

    The nodes and weights are the shipped ones; only the declared number of rows differs, without which each of a text's
    tokens would cost a chunk.

    Args:
        graph_path: the decode graph; the other one lies beside it.
        dims: the model's shape.
        weights: the target, of a static form.
    """
    paths = static_paths(graph_path)
    model = onnx.load(str(paths.prefill), load_external_data=False)
    declared = {value.name: value.type.tensor_type.shape for value in [*model.graph.input, *model.graph.output]}
    tokens = declared[graph_io.INPUT_IDS].dim[1].dim_value
    for name, axis in ((graph_io.LOGIT_INDICES, 0), (graph_io.LOGITS, 1), (graph_io.NEXT_TOKEN_IDS, 1)):
        declared[name].dim[axis].dim_value = tokens
    # External data is found relative to the model's own folder.
    whole = paths.prefill.with_name("every_row.onnx")
    try:
        whole.write_bytes(model.SerializeToString())
        return StaticRunner(StaticPaths(paths.decode, whole), dims, kv_dtype=weights.float_type)
    finally:
        whole.unlink(missing_ok=True)
