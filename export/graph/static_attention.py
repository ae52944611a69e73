"""Attention with standard operators and static shapes, for TensorRT.

``scatter`` writes the new keys and values into the cache (``TensorScatter``) and attends over all of it
(``Attention``). ``primitive`` attends over the cache and the new rows side by side and leaves it to the runner to copy
those into the cache: an engine for TensorRT 10.3 cannot update a tensor in place, and writing the whole cache every
step would cost more than the step. No node depends on the number of new tokens, so that decode and prefill are the same
nodes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from edge_llm.bundle import graph_io
from export.graph.activations import halves
from export.graph.precision import from_float32, to_float32

if TYPE_CHECKING:
    from edge_llm.bundle.manifest import ModelDims
    from export.graph.attention import AttentionLayers, Frequencies
    from export.graph.builder import GraphBuilder

# Beyond any score, in float32; after the softmax it is 0.
_HIDDEN: Final = -1e9
_LAST: Final = np.iinfo(np.int64).max


@dataclass(frozen=True)
class _Shared:
    """What every layer reads.

    Attributes:
        dims: the model's shape.
        mask: which keys a query sees: ``(1, 1, tokens, max_seq_len)`` bool for ``scatter``; for ``primitive`` what is
            added to the scores, ``(1, 1, group * tokens, max_seq_len + tokens)`` float32.
        cos: of the new positions, ``(1, 1, tokens, head_dim / 2)``, or empty without rotary positions.
        sin: the same for the sine.
        interleaved: whether a rotated pair is two neighbours.
    """

    dims: ModelDims
    mask: str
    cos: str = ""
    sin: str = ""
    interleaved: bool = False


def attention_layers(graph: GraphBuilder, dims: ModelDims, frequencies: Frequencies | None) -> AttentionLayers:
    """Add the mask and the rotary tables' rows of the new positions; returns what adds a layer."""
    is_scatter = graph.weights.kernels.form == "scatter"
    mask = _visible_in_cache(graph, dims) if is_scatter else _added_to_scores(graph, dims)
    shared = _Shared(dims, mask)
    if frequencies is not None:
        angles = np.outer(np.arange(dims.max_seq_len, dtype=np.float32), frequencies.inverse)
        tables = {"rotary.cos": np.cos(angles), "rotary.sin": np.sin(angles)}
        cos, sin = (
            graph.node(
                "Gather",
                [graph.initializer(f"{name}.table", table.astype(np.float32)[None]), graph_io.POSITION_IDS],
                [name],
                axis=1,
            )
            for name, table in tables.items()
        )
        shared = _Shared(dims, mask, cos, sin, frequencies.interleaved)
    return functools.partial(_scatter if is_scatter else _primitive, graph, shared)


def _query_positions(graph: GraphBuilder) -> str:
    return graph.node("Reshape", [graph_io.POSITION_IDS, graph.shape(1, 1, -1, 1)], ["mask.queries"])


def _visible_in_cache(graph: GraphBuilder, dims: ModelDims) -> str:
    """A token sees the positions up to its own, which the new rows have been written to by then."""
    places = graph.constant("mask.places", np.arange(dims.max_seq_len, dtype=np.int64).reshape(1, 1, 1, -1))
    return graph.node("LessOrEqual", [places, _query_positions(graph)], ["mask.visible"])


def _added_to_scores(graph: GraphBuilder, dims: ModelDims) -> str:
    """A token sees the cache's valid positions, which end before the first new one, and the new ones up to its own."""
    places = graph.constant("mask.places", np.arange(dims.max_seq_len, dtype=np.int64).reshape(1, -1))
    first = graph.node(
        "Gather", [graph_io.POSITION_IDS, graph.constant("mask.zero", np.zeros(1, np.int64))], ["mask.first"], axis=1
    )
    stale = graph.node("LessOrEqual", [first, places], ["mask.stale"])
    never = graph.constant("mask.never", np.array([[dims.max_seq_len]]))
    cached = graph.node("Where", [stale, never, places], ["mask.cached"])
    keys = graph.node("Concat", [cached, graph_io.POSITION_IDS], ["mask.positions"], axis=1)
    keys = graph.node("Reshape", [keys, graph.shape(1, 1, 1, -1)], ["mask.keys"])
    visible = graph.node("LessOrEqual", [keys, _query_positions(graph)], ["mask.visible"])
    values = [graph.number(f"mask.{name}", value) for name, value in (("seen", 0), ("hidden", _HIDDEN))]
    added = graph.node("Where", [visible, *values], ["mask.added"])
    group = dims.num_heads // dims.num_kv_heads
    # The queries of the heads that share keys lie below each other.
    return added if group == 1 else graph.node("Concat", [added] * group, ["mask.groups"], axis=2)


def _scatter(graph: GraphBuilder, shared: _Shared, qkv: str, layer: int, *, scale: float = 0.0) -> str:
    query, *new = _split_heads(graph, shared, qkv, layer)
    pasts, presents = graph_io.past_names(layer), graph_io.present_names(layer)
    for past, rows, present in zip(pasts, new, presents, strict=True):
        # TensorRT's parser takes no other axis.
        graph.node("TensorScatter", [past, rows, graph_io.WRITE_INDEX], [present], axis=-2, mode="linear")
    output = f"layer.{layer}.attention"
    heads = graph.node(
        "Attention",
        [query, *presents, shared.mask],
        [f"{output}.heads"],
        is_causal=0,
        scale=scale or shared.dims.head_dim**-0.5,
    )
    return _merge_heads(graph, shared.dims, heads, output)


def _primitive(graph: GraphBuilder, shared: _Shared, qkv: str, layer: int, *, scale: float = 0.0) -> str:
    dims, output = shared.dims, f"layer.{layer}.attention"
    query, *new = _split_heads(graph, shared, qkv, layer, graph_io.new_names(layer))
    # Scaled before the product, which is then smaller in float16.
    factor = graph.number(f"{output}.factor", scale or dims.head_dim**-0.5, graph.weights.float_type)
    query = graph.node("Mul", [query, factor], [f"{output}.scaled"])
    # One matrix for all the heads that share keys: (1, kv_heads, group * tokens, head_dim).
    query = graph.node("Reshape", [query, graph.shape(1, dims.num_kv_heads, -1, dims.head_dim)], [f"{output}.queries"])
    (past_key, past_value), (new_key, new_value) = graph_io.past_names(layer), new
    scores = []
    for part, key in (("past", past_key), ("new", new_key)):
        turned = graph.node("Transpose", [key], [f"{output}.{part}_keys"], perm=[0, 1, 3, 2])
        scores.append(graph.node("MatMul", [query, turned], [f"{output}.{part}_scores"]))
    both = graph.node("Concat", scores, [f"{output}.scores"], axis=-1)
    masked = graph.node("Add", [to_float32(graph, both, f"{output}.wide"), shared.mask], [f"{output}.masked"])
    weights = graph.node("Softmax", [masked], [f"{output}.softmax"], axis=-1)
    weights = from_float32(graph, weights, f"{output}.weights")
    edge = dims.max_seq_len
    sums = []
    for part, value, start, end in (("past", past_value, 0, edge), ("new", new_value, edge, _LAST)):
        bounds = [graph.shape(bound) for bound in (start, end, -1)]
        some = graph.node("Slice", [weights, *bounds], [f"{output}.{part}_weights"])
        sums.append(graph.node("MatMul", [some, value], [f"{output}.{part}_values"]))
    total = graph.node("Add", sums, [f"{output}.sum"])
    heads = graph.node("Reshape", [total, graph.shape(1, dims.num_heads, -1, dims.head_dim)], [f"{output}.heads"])
    return _merge_heads(graph, dims, heads, output)


def _split_heads(
    graph: GraphBuilder, shared: _Shared, qkv: str, layer: int, new_names: tuple[str, str] | None = None
) -> tuple[str, str, str]:
    """Queries ``(1, num_heads, tokens, head_dim)`` and new keys and values ``(1, num_kv_heads, tokens, head_dim)``."""
    dims, name = shared.dims, f"layer.{layer}"
    queries, keys = dims.num_heads, dims.num_kv_heads
    rows = graph.node("Reshape", [qkv, graph.shape(0, 0, queries + 2 * keys, dims.head_dim)], [f"{name}.rows"])
    heads = graph.node("Transpose", [rows], [f"{name}.heads"], perm=[0, 2, 1, 3])
    key, value = new_names or (f"{name}.key", f"{name}.value")
    query = f"{name}.query"
    if not shared.cos:
        graph.node("Split", [heads, graph.shape(queries, keys, keys)], [query, key, value], axis=1)
        return query, key, value
    both = f"{name}.query_key"
    graph.node("Split", [heads, graph.shape(queries + keys, keys)], [both, value], axis=1)
    rotated = _rotate(graph, shared, both, f"{name}.rotated")
    graph.node("Split", [rotated, graph.shape(queries, keys)], [query, key], axis=1)
    return query, key, value


def _rotate(graph: GraphBuilder, shared: _Shared, x: str, name: str) -> str:
    """Turn each pair of values of ``x (1, heads, tokens, head_dim)`` by its position's angle.

    Neighbouring pairs come out half a head apart, in queries and keys alike, which leaves their products as they are.
    """
    half = shared.dims.head_dim // 2
    if shared.interleaved:
        pairs = graph.node("Reshape", [x, graph.shape(0, 0, 0, half, 2)], [f"{name}.pairs"])
        apart = graph.node("Transpose", [pairs], [f"{name}.apart"], perm=[0, 1, 2, 4, 3])
        x = graph.node("Reshape", [apart, graph.shape(0, 0, 0, 2 * half)], [f"{name}.halves"])
    first, second = f"{name}.first", f"{name}.second"
    halves(graph, x, [first, second], half)
    products = {
        f"{part}.{table}": graph.node("Mul", [part, table], [f"{part}.{table}"])
        for part in (first, second)
        for table in (shared.cos, shared.sin)
    }
    upper = graph.node(
        "Sub", [products[f"{first}.{shared.cos}"], products[f"{second}.{shared.sin}"]], [f"{name}.upper"]
    )
    lower = graph.node(
        "Add", [products[f"{second}.{shared.cos}"], products[f"{first}.{shared.sin}"]], [f"{name}.lower"]
    )
    return graph.node("Concat", [upper, lower], [name], axis=-1)


def _merge_heads(graph: GraphBuilder, dims: ModelDims, heads: str, output: str) -> str:
    """``(1, num_heads, tokens, head_dim)`` to ``(1, tokens, num_heads * head_dim)``."""
    rows = graph.node("Transpose", [heads], [f"{output}.by_token"], perm=[0, 2, 1, 3])
    return graph.node("Reshape", [rows, graph.shape(0, 0, dims.num_heads * dims.head_dim)], [output])
