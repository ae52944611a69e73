"""Attention in the form of the target."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple, Protocol

from export.graph import gqa, static_attention

if TYPE_CHECKING:
    from edge_llm.bundle.manifest import ModelDims
    from export.graph.builder import GraphBuilder
    from export.tensors import Float32Array


class Frequencies(NamedTuple):
    """Rotary positions.

    Attributes:
        inverse: angle per position of each pair, ``(head_dim / 2,)`` float32.
        interleaved: whether a rotated pair is two neighbours (GGUF's Llama rows) or half a head apart (Hugging Face).
    """

    inverse: Float32Array
    interleaved: bool


class AttentionLayers(Protocol):
    """Adds one layer's attention to a graph."""

    def __call__(self, qkv: str, layer: int, *, scale: float = 0.0) -> str:
        """Causal attention of the new rows over the cache and themselves, which are appended to the cache.

        Args:
            qkv: queries, keys and values side by side, ``(batch, seq, (num_heads + 2 * num_kv_heads) * head_dim)``.
            layer: whose cache.
            scale: of the scores; 0 is ``1 / sqrt(head_dim)``.

        Returns:
            The name of the output ``(batch, seq, num_heads * head_dim)``.
        """


def attention_layers(graph: GraphBuilder, dims: ModelDims, frequencies: Frequencies | None = None) -> AttentionLayers:
    """Add what all layers share, the tables of rotary positions and the mask; returns what adds a layer."""
    if graph.weights.is_static:
        return static_attention.attention_layers(graph, dims, frequencies)
    rotary = None
    if frequencies is not None:
        inverse, interleaved = frequencies
        rotary = gqa.rotary_caches(graph, inverse, dims.max_seq_len, interleaved=interleaved)
    return functools.partial(_group_query_attention, graph, dims, rotary)


def _group_query_attention(
    graph: GraphBuilder, dims: ModelDims, rotary: gqa.Rotary | None, qkv: str, layer: int, *, scale: float = 0.0
) -> str:
    return gqa.attention(graph, qkv, layer, dims, rotary=rotary, scale=scale)
