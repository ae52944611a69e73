"""Measuring activations: the float32 graph over a small text, with the tensors of interest as outputs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import onnx
import onnxruntime

from edge_llm.bundle import graph_io
from export.console import progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edge_llm.bundle.manifest import ModelDims
    from export.tensors import Float32Array

# Not the text that quality is measured on.
CALIBRATION_TEXT: Final = Path(__file__).parent / "data" / "calibration_text.txt"


def measure_magnitudes(
    graph_path: Path, dims: ModelDims, activations: Sequence[str], windows: Sequence[Sequence[int]]
) -> dict[str, Float32Array]:
    """Root mean square of every channel of the named activations.

    Args:
        graph_path: the ``cpu-fp32`` graph; a copy with more outputs is written beside it and removed.
        dims: the model's shape.
        activations: tensors ``(batch, seq, channels)`` inside the graph.
        windows: token ids of texts that each fit the context.

    Returns:
        ``(channels,)`` float32 by name.
    """
    model = onnx.load(str(graph_path), load_external_data=False)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in activations)
    # External data is found relative to the model's own folder.
    observed_path = graph_path.with_name("observed.onnx")
    try:
        observed_path.write_bytes(model.SerializeToString())
        session = onnxruntime.InferenceSession(str(observed_path), providers=["CPUExecutionProvider"])
    finally:
        observed_path.unlink(missing_ok=True)
    takes_positions = graph_io.POSITION_IDS in {node.name for node in session.get_inputs()}
    cache = np.zeros((1, dims.num_kv_heads, dims.max_seq_len, dims.head_dim), np.float32)
    feed: dict[str, NDArray[Any]] = {
        name: cache for layer in range(dims.num_layers) for name in graph_io.past_names(layer)
    }
    feed[graph_io.LOGIT_INDICES] = np.zeros(1, np.int64)
    squares: dict[str, NDArray[np.float64]] = {name: np.zeros((), np.float64) for name in activations}
    total_tokens = sum(map(len, windows))
    with progress("calibrating", total_tokens, unit="tok") as bar:
        for token_ids in windows:
            window = np.asarray([token_ids], np.int64)
            count = window.shape[1]
            feed[graph_io.INPUT_IDS] = window
            if takes_positions:
                feed[graph_io.POSITION_IDS] = np.arange(count, dtype=np.int64)[None]
            feed[graph_io.SEQLENS_K] = np.asarray([count - 1], np.int32)
            feed[graph_io.TOTAL_SEQUENCE_LENGTH] = np.asarray(count, np.int32)
            for name, values in zip(activations, session.run(list(activations), feed), strict=True):
                squares[name] = squares[name] + np.square(values[0], dtype=np.float64).sum(axis=0)
            bar.update(count)
    return {name: np.sqrt(total / total_tokens).astype(np.float32) for name, total in squares.items()}
