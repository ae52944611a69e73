"""Activation functions, in the operators of each form."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from export.graph.precision import from_float32, to_float32

if TYPE_CHECKING:
    from export.graph.builder import GraphBuilder

# tanh's formula of GELU: Hendrycks and Gimpel, Gaussian Error Linear Units, 2016.
_GELU_SCALE: Final = math.sqrt(2 / math.pi)
_GELU_CUBE: Final = 0.044715


def gelu_tanh(graph: GraphBuilder, x: str, name: str) -> str:
    """GELU in its approximation with tanh; returns ``name``."""
    form = graph.weights.kernels.form
    if form == "gqa":
        return graph.contrib("FastGelu", [x], [name])
    if form == "scatter":
        return graph.node("Gelu", [x], [name], approximate="tanh")
    # 0.5 (1 + tanh(z)) is sigmoid(2 z). The cube leaves float16's range.
    wide = to_float32(graph, x, f"{name}.wide")
    square = graph.node("Mul", [wide, wide], [f"{name}.square"])
    factor = graph.number("gelu.cube", 2 * _GELU_SCALE * _GELU_CUBE)
    offset = graph.number("gelu.scale", 2 * _GELU_SCALE)
    scaled = graph.node("Mul", [square, factor], [f"{name}.scaled"])
    slope = graph.node("Add", [scaled, offset], [f"{name}.slope"])
    exponent = graph.node("Mul", [wide, slope], [f"{name}.exponent"])
    gate = graph.node("Sigmoid", [exponent], [f"{name}.gate"])
    return graph.node("Mul", [x, from_float32(graph, gate, f"{name}.narrow")], [name])


def gelu_exact(graph: GraphBuilder, x: str, name: str) -> str:
    """GELU with the error function; returns ``name``."""
    if graph.weights.kernels.form != "primitive":
        return graph.node("Gelu", [x], [name], approximate="none")
    wide = to_float32(graph, x, f"{name}.wide")
    scaled = graph.node("Mul", [wide, graph.number("gelu.root", math.sqrt(0.5))], [f"{name}.scaled"])
    error = graph.node("Erf", [scaled], [f"{name}.error"])
    shifted = graph.node("Add", [error, graph.number("gelu.one", 1.0)], [f"{name}.shifted"])
    gate = graph.node("Mul", [shifted, graph.number("gelu.half", 0.5)], [f"{name}.gate"])
    return graph.node("Mul", [x, from_float32(graph, gate, f"{name}.narrow")], [name])


def relu(graph: GraphBuilder, x: str, name: str) -> str:
    """The positive part; returns ``name``."""
    return graph.node("Relu", [x], [name])


def sigmoid_linear(graph: GraphBuilder, x: str, name: str, alpha: float = 1.0) -> str:
    """``x * sigmoid(alpha * x)``: SiLU, or with 1.702 the quick GELU; returns ``name``."""
    if not graph.weights.is_static:
        return graph.contrib("QuickGelu", [x], [name], alpha=alpha)
    scaled = x
    if alpha != 1:
        scaled = graph.node(
            "Mul", [x, graph.number("sigmoid.alpha", alpha, graph.weights.float_type)], [f"{name}.scaled"]
        )
    gate = graph.node("Sigmoid", [scaled], [f"{name}.gate"])
    return graph.node("Mul", [x, gate], [name])


def halves(graph: GraphBuilder, x: str, outputs: list[str], size: int) -> None:
    """Split the last axis into two parts of ``size`` each."""
    if graph.weights.is_static:
        # The attribute came with opset 18.
        graph.node("Split", [x, graph.shape(size, size)], outputs, axis=-1)
    else:
        graph.node("Split", [x], outputs, axis=-1, num_outputs=2)
