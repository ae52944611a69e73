"""Building one target's graph from a checkpoint, and what that takes on disk."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from edge_llm import __version__
from edge_llm.bundle.manifest import Graph
from export.console import progress
from export.graph.builder import DATA_FILE, IR_VERSION, MODEL_FILE, OPSET, GraphBuilder

if TYPE_CHECKING:
    from pathlib import Path

    from edge_llm.bundle.manifest import ModelDims
    from export.checkpoint import Checkpoint
    from export.graph.weights import WeightFormat

# The first release with every kernel and option that the graphs and the runner use.
MIN_ONNXRUNTIME: Final = "1.23"


def build_graph(checkpoint: Checkpoint, weights: WeightFormat, dims: ModelDims, folder: Path) -> Path:
    """Write model.onnx and model.onnx.data into ``folder``, which is created; returns the path of model.onnx."""
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
        return graph.save(dims, takes_positions=architecture.takes_positions, metadata=metadata)


def describe_graph(weights: WeightFormat) -> Graph:
    """The manifest's entry of a target."""
    folder = f"graphs/{weights.target}"
    return Graph(
        target=weights.target,
        file=f"{folder}/{MODEL_FILE}",
        data_file=f"{folder}/{DATA_FILE}",
        bits=weights.bits,
        block_size=weights.block_size,
        kv_dtype="float32",
        opset=OPSET,
        ir_version=IR_VERSION,
        min_onnxruntime=MIN_ONNXRUNTIME,
    )


def estimated_bytes(checkpoint: Checkpoint, weights: WeightFormat, dims: ModelDims) -> int:
    """Bytes of a target's data file, a little more rather than less."""
    architecture = checkpoint.architecture
    present = checkpoint.tensors.shapes
    total = 2 * 4 * dims.max_seq_len * dims.head_dim  # rotary tables, where there are any
    for name, shape in {**architecture.optional_shapes(), **architecture.required_shapes()}.items():
        if name not in present:
            continue
        count = math.prod(shape)
        is_matrix = len(shape) == 2 and name != "wpe.weight"
        # Scales at the finest block that a matrix may fall back to: a quarter byte a weight.
        total += count * weights.bits // 8 + count // 4 if weights.is_quantized and is_matrix else 4 * count
    return total
