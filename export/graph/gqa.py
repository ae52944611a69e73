"""Attention over the static cache with ``GroupQueryAttention``, which appends in place (CPU and CUDA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_llm.bundle import graph_io
from export.errors import ExportError

if TYPE_CHECKING:
    from edge_llm.bundle.manifest import ModelDims
    from export.graph.builder import GraphBuilder
    from export.tensors import Float32Array


@dataclass(frozen=True)
class Rotary:
    """Rotary positions, shared by every layer.

    Attributes:
        cos: initializer ``(max_seq_len, head_dim / 2)`` float32.
        sin: the same for the sine.
        interleaved: whether a rotated pair is two neighbours (GGUF's Llama rows) or half a head apart (Hugging Face).
    """

    cos: str
    sin: str
    interleaved: bool


def rotary_caches(graph: GraphBuilder, inverse_frequencies: Float32Array, length: int, *, interleaved: bool) -> Rotary:
    """Tabulate the angles.

    Args:
        graph: the graph.
        inverse_frequencies: ``(head_dim / 2,)`` float32.
        length: positions in the cache.
        interleaved: see ``Rotary``.
    """
    angles = np.outer(np.arange(length, dtype=np.float32), inverse_frequencies)
    return Rotary(
        graph.initializer("rotary.cos", np.cos(angles).astype(np.float32)),
        graph.initializer("rotary.sin", np.sin(angles).astype(np.float32)),
        interleaved,
    )


def check_head_dim(dims: ModelDims, *, rotary: bool) -> None:
    """Refuse what the kernel refuses: heads that are not a multiple of 8 (16 with rotary positions)."""
    multiple = 16 if rotary else 8
    if dims.head_dim % multiple:
        raise ExportError(
            f"heads of {dims.head_dim} values are not supported: ONNX Runtime's GroupQueryAttention wants a multiple "
            f"of {multiple} for this architecture"
        )


def attention(
    graph: GraphBuilder, qkv: str, layer: int, dims: ModelDims, *, rotary: Rotary | None = None, scale: float = 0.0
) -> str:
    """Causal attention of the new rows over the cache and themselves, appended to the cache.

    Args:
        graph: the graph.
        qkv: queries, keys and values side by side, ``(batch, seq, (num_heads + 2 * num_kv_heads) * head_dim)``.
        layer: whose cache.
        dims: the model's shape.
        rotary: applied to queries and keys, or None.
        scale: of the scores; 0 is ``1 / sqrt(head_dim)``.

    Returns:
        The name of the output ``(batch, seq, num_heads * head_dim)``.
    """
    output = f"layer.{layer}.attention"
    inputs = [qkv, "", "", *graph_io.past_names(layer), graph_io.SEQLENS_K, graph_io.TOTAL_SEQUENCE_LENGTH]
    attributes: dict[str, Any] = {"num_heads": dims.num_heads, "kv_num_heads": dims.num_kv_heads, "do_rotary": 0}
    if rotary is not None:
        inputs += [rotary.cos, rotary.sin]
        attributes |= {"do_rotary": 1, "rotary_interleaved": int(rotary.interleaved)}
    if scale:
        attributes["scale"] = scale
    return graph.contrib("GroupQueryAttention", inputs, [output, *graph_io.present_names(layer)], **attributes)
