"""Stretches of a float16 graph that compute in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx import TensorProto

if TYPE_CHECKING:
    from export.graph.builder import GraphBuilder


def to_float32(graph: GraphBuilder, x: str, name: str) -> str:
    """``x`` in float32: a cast called ``name``, or ``x`` itself in a float32 graph."""
    return x if graph.weights.float_type == "float32" else graph.node("Cast", [x], [name], to=TensorProto.FLOAT)


def from_float32(graph: GraphBuilder, x: str, name: str) -> str:
    """A float32 tensor in the graph's own type: a cast called ``name``, or ``x`` itself in a float32 graph."""
    return x if graph.weights.float_type == "float32" else graph.node("Cast", [x], [name], to=TensorProto.FLOAT16)
