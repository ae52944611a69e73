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
# With every tensor of every layer kept, a chunk of SmolLM2-135M takes some 200 MB.
_CHUNK_TOKENS: Final = 128


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
    session = _observing_session(graph_path, activations)
    cache = np.zeros((1, dims.num_kv_heads, dims.max_seq_len, dims.head_dim), np.float32)
    pasts = {name: cache for layer in range(dims.num_layers) for name in graph_io.past_names(layer)}
    squares: dict[str, NDArray[np.float64]] = {name: np.zeros((), np.float64) for name in activations}
    total_tokens = sum(map(len, windows))
    with progress("calibrating", total_tokens, unit="tok") as bar:
        for token_ids in windows:
            values = session.run(list(activations), _feed(session, token_ids, 0, [0]) | pasts)
            for name, rows in zip(activations, values, strict=True):
                squares[name] = squares[name] + np.square(rows[0], dtype=np.float64).sum(axis=0)
            bar.update(len(token_ids))
    return {name: np.sqrt(total / total_tokens).astype(np.float32) for name, total in squares.items()}


def measure_largest(
    graph_path: Path, dims: ModelDims, windows: Sequence[Sequence[int]], description: str
) -> dict[str, float]:
    """Largest absolute value of everything that a float16 graph computes, keys and values included.

    Args:
        graph_path: the graph, of a static form the one for prefill; a copy with more outputs is written beside it and
            removed.
        dims: the model's shape.
        windows: token ids of texts that each fit the context.
        description: for the progress bar.

    Returns:
        By the tensor's name, in the graph's order; infinite or not a number where float16 did not suffice.
    """
    nodes = onnx.load(str(graph_path), load_external_data=False).graph.node
    session = _observing_session(graph_path, [name for node in nodes for name in node.output if name])
    fixed = _fixed_tokens(session)
    names = [output.name for output in session.get_outputs() if output.type == "tensor(float16)"]
    layers = range(dims.num_layers)
    pasts = [name for layer in layers for name in graph_io.past_names(layer)]
    presents = [name for layer in layers for name in graph_io.present_names(layer)]
    news = [name for layer in layers for name in graph_io.new_names(layer) if name in names]
    empty = np.zeros((1, dims.num_kv_heads, dims.max_seq_len, dims.head_dim), np.float16)
    largest: dict[str, float] = {}
    with progress(description, sum(map(len, windows)), unit="tok") as bar:
        for window in windows:
            cache: dict[str, NDArray[Any]] = dict.fromkeys(pasts, empty)
            for start in range(0, len(window), fixed or _CHUNK_TOKENS):
                chunk = window[start : start + (fixed or _CHUNK_TOKENS)]
                if start + (fixed or 0) > dims.max_seq_len:
                    break  # the padding has no room: these tokens are for the decode graph, of the same nodes
                feed = _fixed_feed(session, chunk, start) if fixed else _feed(session, chunk, start, range(len(chunk)))
                values = dict(zip(names, session.run(names, feed | cache), strict=True))
                if news:
                    cache = _appended(cache, [values[name][:, :, : len(chunk)] for name in news], start)
                else:
                    cache = {past: values[present] for past, present in zip(pasts, presents, strict=True)}
                    # Behind its valid part a fresh cache holds whatever was in the memory.
                    values |= {name: values[name][:, :, : start + len(chunk)] for name in presents}
                for name, array in values.items():
                    # Not the built-in max: a value that is not a number must stay.
                    largest[name] = float(np.maximum(largest.get(name, 0.0), np.abs(array.astype(np.float32)).max()))
                bar.update(len(chunk))
    order = {name: place for place, name in enumerate(name for node in nodes for name in node.output)}
    return dict(sorted(largest.items(), key=lambda entry: order[entry[0]]))


def _observing_session(graph_path: Path, names: Sequence[str]) -> onnxruntime.InferenceSession:
    """The graph with more of its tensors as outputs."""
    model = onnx.load(str(graph_path), load_external_data=False)
    own = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in own)
    # External data is found relative to the model's own folder.
    observed_path = graph_path.with_name("observed.onnx")
    try:
        observed_path.write_bytes(model.SerializeToString())
        options = onnxruntime.SessionOptions()
        # A cache that is not updated in place is worth a warning elsewhere; here every past is looked at.
        options.log_severity_level = 3
        return onnxruntime.InferenceSession(str(observed_path), options, providers=["CPUExecutionProvider"])
    finally:
        observed_path.unlink(missing_ok=True)


def _feed(
    session: onnxruntime.InferenceSession, token_ids: Sequence[int], past_len: int, logit_indices: Sequence[int]
) -> dict[str, NDArray[Any]]:
    """Every input but the cache, for new tokens behind ``past_len`` positions."""
    total = past_len + len(token_ids)
    feed: dict[str, NDArray[Any]] = {
        graph_io.INPUT_IDS: np.asarray([token_ids], np.int64),
        graph_io.SEQLENS_K: np.asarray([total - 1], np.int32),
        graph_io.TOTAL_SEQUENCE_LENGTH: np.asarray(total, np.int32),
        graph_io.LOGIT_INDICES: np.asarray(logit_indices, np.int64),
    }
    if graph_io.POSITION_IDS in {node.name for node in session.get_inputs()}:
        feed[graph_io.POSITION_IDS] = np.arange(past_len, total, dtype=np.int64)[None]
    return feed


def _fixed_tokens(session: onnxruntime.InferenceSession) -> int | None:
    """Tokens that a static graph takes; None for one that takes any number."""
    tokens = next(node.shape[1] for node in session.get_inputs() if node.name == graph_io.INPUT_IDS)
    return tokens if isinstance(tokens, int) else None


def _fixed_feed(
    session: onnxruntime.InferenceSession, token_ids: Sequence[int], past_len: int
) -> dict[str, NDArray[Any]]:
    """Like ``_feed`` for a static graph, padded as the runner pads: what the padding computes must stay finite too."""
    shapes = {node.name: node.shape for node in session.get_inputs()}
    tokens = shapes[graph_io.INPUT_IDS][1]
    padded = [*token_ids, *[token_ids[-1]] * (tokens - len(token_ids))]
    feed = {
        graph_io.INPUT_IDS: np.asarray([padded], np.int64),
        graph_io.POSITION_IDS: np.arange(past_len, past_len + tokens, dtype=np.int64)[None],
        graph_io.WRITE_INDEX: np.asarray([past_len], np.int64),
        graph_io.LOGIT_INDICES: np.asarray([len(token_ids) - 1], np.int64),
    }
    return {name: array for name, array in feed.items() if name in shapes}


def _appended(cache: dict[str, NDArray[Any]], new_rows: Sequence[NDArray[Any]], start: int) -> dict[str, NDArray[Any]]:
    """The cache with new rows ``(1, kv_heads, tokens, head_dim)`` from position ``start`` on."""
    appended = {name: array.copy() for name, array in cache.items()}
    for array, rows in zip(appended.values(), new_rows, strict=True):
        array[:, :, start : start + rows.shape[2]] = rows
    return appended
