"""Building one target's graph from a checkpoint, and what that takes on disk."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import onnx

from edge_llm import __version__
from edge_llm.bundle.manifest import Graph
from export.console import progress
from export.graph.builder import DATA_FILE, MODEL_FILE, PREFILL_FILE, GraphBuilder
from export.graph.check import check_graph
from export.graph.io import prefill_chunk

if TYPE_CHECKING:
    from pathlib import Path

    from edge_llm.bundle.manifest import ModelDims
    from export.checkpoint import Checkpoint
    from export.graph.weights import WeightFormat


def build_graph(checkpoint: Checkpoint, weights: WeightFormat, dims: ModelDims, folder: Path) -> Path:
    """Write model.onnx and model.onnx.data into ``folder``, which is created; returns the path of model.onnx.

    A static form gets prefill.onnx, too. One in int8 is not quantised yet: ``quantize_qdq`` does it, and checks.

    Raises:
        ExportError: a weight does not fit the target, or the graph breaks one of its rules.
    """
    folder.mkdir(parents=True)
    architecture = checkpoint.architecture
    metadata = {
        "exporter": f"edge_llm {__version__}",
        "target": weights.target,
        "bits": str(weights.bits),
        "source": checkpoint.source,
    }
    total = estimated_bytes(checkpoint, weights, dims)
    with (
        progress(f"building {weights.target}", total, unit="B", is_bytes=True) as bar,
        GraphBuilder(folder, weights, bar.update) as graph,
    ):
        architecture.build(graph, checkpoint.tensors, dims)
        path = graph.save(dims, takes_positions=architecture.takes_positions, metadata=metadata)
    if not weights.is_qdq:
        for name in (MODEL_FILE, PREFILL_FILE) if weights.is_static else (MODEL_FILE,):
            check_graph(onnx.load(str(folder / name), load_external_data=False), weights, dims)
    return path


def describe_graph(weights: WeightFormat, dims: ModelDims) -> Graph:
    """The manifest's entry of a target."""
    folder = f"graphs/{weights.target}"
    return Graph(
        target=weights.target,
        file=f"{folder}/{MODEL_FILE}",
        data_file=f"{folder}/{DATA_FILE}",
        bits=weights.bits,
        block_size=weights.block_size,
        kv_dtype=weights.float_type,
        opset=weights.kernels.opset,
        ir_version=weights.kernels.ir_version,
        min_onnxruntime=weights.kernels.min_onnxruntime,
        form=weights.kernels.form,
        prefill_file=f"{folder}/{PREFILL_FILE}" if weights.is_static else None,
        prefill_chunk=prefill_chunk(dims) if weights.is_static else None,
    )


def estimated_bytes(checkpoint: Checkpoint, weights: WeightFormat, dims: ModelDims) -> int:
    """Bytes of disk that a target takes while it is built: its data file, a little more rather than less."""
    architecture = checkpoint.architecture
    present = checkpoint.tensors.shapes
    float_bytes = np.dtype(weights.float_type).itemsize
    total = 2 * float_bytes * dims.max_seq_len * dims.head_dim  # rotary tables, where there are any
    for name, shape in {**architecture.optional_shapes(), **architecture.required_shapes()}.items():
        if name not in present:
            continue
        count = math.prod(shape)
        is_matrix = len(shape) == 2 and name != "wpe.weight"
        # Scales at the finest block that a matrix may fall back to: a quarter byte a weight.
        quantized_bytes = count * weights.bits // 8 + count // 4
        total += quantized_bytes if weights.is_quantized and is_matrix else float_bytes * count
        if is_matrix and shape[0] == dims.vocab_size and not weights.kernels.gathers_blocks:
            # A table of the head's own beside the embedding's, or rows of padding.
            total += float_bytes * count
    # While its products are being quantised, there is a copy.
    return 2 * total if weights.is_qdq else total
