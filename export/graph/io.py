"""The inputs and outputs of every form, as a graph declares them (edge_llm/bundle/graph_io.py tells what they are)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
from onnx import TensorProto, helper

from edge_llm.bundle import graph_io

if TYPE_CHECKING:
    import onnx

    from edge_llm.bundle.manifest import ModelDims
    from export.graph.weights import WeightFormat

_PREFILL_CHUNK: Final = 64
# Tensor cores take tokens in eights.
CHUNK_MULTIPLE: Final = 8


class DeclaredIO(NamedTuple):
    """A graph's declared inputs and outputs, in their order."""

    inputs: list[onnx.ValueInfoProto]
    outputs: list[onnx.ValueInfoProto]


def prefill_chunk(dims: ModelDims) -> int:
    """Tokens that the prefill graph of a static form takes at once, padding included."""
    return min(_PREFILL_CHUNK, dims.max_seq_len // CHUNK_MULTIPLE * CHUNK_MULTIPLE)


def declare_io(dims: ModelDims, weights: WeightFormat, *, takes_positions: bool) -> DeclaredIO:
    """For a graph that takes any number of tokens and rows."""
    value = helper.make_tensor_value_info
    inputs = [value(graph_io.INPUT_IDS, TensorProto.INT64, ["batch", "seq"])]
    if takes_positions:
        inputs.append(value(graph_io.POSITION_IDS, TensorProto.INT64, ["batch", "seq"]))
    inputs += [
        value(graph_io.SEQLENS_K, TensorProto.INT32, ["batch"]),
        value(graph_io.TOTAL_SEQUENCE_LENGTH, TensorProto.INT32, []),
        value(graph_io.LOGIT_INDICES, TensorProto.INT64, ["n"]),
    ]
    outputs = [
        value(graph_io.LOGITS, TensorProto.FLOAT, ["batch", "n", dims.vocab_size]),
        value(graph_io.NEXT_TOKEN_IDS, TensorProto.INT64, ["batch", "n"]),
    ]
    cache_shape: list[str | int | None] = ["batch", dims.num_kv_heads, dims.max_seq_len, dims.head_dim]
    for layer in range(dims.num_layers):
        inputs += _cache(graph_io.past_names(layer), weights, cache_shape)
        outputs += _cache(graph_io.present_names(layer), weights, cache_shape)
    return DeclaredIO(inputs, outputs)


def declare_static_io(dims: ModelDims, weights: WeightFormat, tokens: int, rows: int = 1) -> DeclaredIO:
    """For a graph of one row of the cache and a fixed number of tokens.

    Args:
        dims: the model's shape.
        weights: the target, of a static form.
        tokens: how many it takes.
        rows: how many of their logits it computes.
    """
    value = helper.make_tensor_value_info
    inputs = [value(name, TensorProto.INT64, [1, tokens]) for name in (graph_io.INPUT_IDS, graph_io.POSITION_IDS)]
    is_scatter = weights.kernels.form == "scatter"
    if is_scatter:
        inputs.append(value(graph_io.WRITE_INDEX, TensorProto.INT64, [1]))
    inputs.append(value(graph_io.LOGIT_INDICES, TensorProto.INT64, [rows]))
    outputs = [
        value(graph_io.LOGITS, TensorProto.FLOAT, [1, rows, dims.vocab_size]),
        value(graph_io.NEXT_TOKEN_IDS, TensorProto.INT64, [1, rows]),
    ]
    cache_shape: list[str | int | None] = [1, dims.num_kv_heads, dims.max_seq_len, dims.head_dim]
    new_shape: list[str | int | None] = [1, dims.num_kv_heads, tokens, dims.head_dim]
    for layer in range(dims.num_layers):
        inputs += _cache(graph_io.past_names(layer), weights, cache_shape)
        if is_scatter:
            outputs += _cache(graph_io.present_names(layer), weights, cache_shape)
        else:
            outputs += _cache(graph_io.new_names(layer), weights, new_shape)
    return DeclaredIO(inputs, outputs)


def _cache(names: tuple[str, str], weights: WeightFormat, shape: list[str | int | None]) -> list[onnx.ValueInfoProto]:
    data_type = helper.np_dtype_to_tensor_dtype(np.dtype(weights.float_type))
    return [helper.make_tensor_value_info(name, data_type, shape) for name in names]
