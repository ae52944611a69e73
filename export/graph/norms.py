"""Normalisation, alone and fused with the residual's addition where a form has an operator for that."""

from __future__ import annotations

from typing import TYPE_CHECKING

from export.graph.precision import from_float32, to_float32

if TYPE_CHECKING:
    from export.graph.builder import GraphBuilder


def layer_norm(graph: GraphBuilder, x: str, parameters: tuple[str, str], name: str, epsilon: float) -> str:
    """LayerNorm of ``x (batch, seq, hidden)`` over its last axis.

    Args:
        graph: the graph.
        x: the tensor.
        parameters: initializers of weight and bias, ``(hidden,)`` each.
        name: of the output.
        epsilon: added to the variance.

    Returns:
        ``name``.
    """
    return graph.node("LayerNormalization", [x, *parameters], [name], axis=-1, epsilon=epsilon)


def add_layer_norm(
    graph: GraphBuilder, residual: str, branch: str, parameters: tuple[str, str], name: str, epsilon: float
) -> tuple[str, str]:
    """Add a branch to the residual and normalise; arguments as of ``layer_norm``.

    Returns:
        The names of the normalised sum and of the sum, each ``(batch, seq, hidden)``.
    """
    total = f"{name}.residual"
    if graph.weights.is_static:
        graph.node("Add", [residual, branch], [total])
        return layer_norm(graph, total, parameters, name, epsilon), total
    graph.contrib("SkipLayerNormalization", [residual, branch, *parameters], [name, "", "", total], epsilon=epsilon)
    return name, total


def rms_norm(graph: GraphBuilder, x: str, weight: str, name: str, epsilon: float) -> str:
    """RMSNorm of ``x (batch, seq, hidden)`` over its last axis.

    Args:
        graph: the graph.
        x: the tensor.
        weight: initializer ``(hidden,)``.
        name: of the output.
        epsilon: added to the mean square.

    Returns:
        ``name``.
    """
    form = graph.weights.kernels.form
    if form == "primitive":
        return _rms_norm_of_primitives(graph, x, weight, name, epsilon)
    kind = "RMSNormalization" if form == "scatter" else "SimplifiedLayerNormalization"
    return graph.node(kind, [x, weight], [name], axis=-1, epsilon=epsilon)


def add_rms_norm(
    graph: GraphBuilder, residual: str, branch: str, weight: str, name: str, epsilon: float
) -> tuple[str, str]:
    """Add a branch to the residual and normalise; arguments as of ``rms_norm``.

    Returns:
        The names of the normalised sum and of the sum, each ``(batch, seq, hidden)``.
    """
    total = f"{name}.residual"
    if graph.weights.is_static:
        graph.node("Add", [residual, branch], [total])
        return rms_norm(graph, total, weight, name, epsilon), total
    graph.contrib(
        "SkipSimplifiedLayerNormalization", [residual, branch, weight], [name, "", "", total], epsilon=epsilon
    )
    return name, total


def _rms_norm_of_primitives(graph: GraphBuilder, x: str, weight: str, name: str, epsilon: float) -> str:
    """``x / sqrt(mean(x²) + epsilon) * weight``; squares of activations leave float16's range."""
    wide = to_float32(graph, x, f"{name}.wide")
    square = graph.node("Mul", [wide, wide], [f"{name}.square"])
    mean = graph.node("ReduceMean", [square], [f"{name}.mean"], axes=[-1], keepdims=1)
    shifted = graph.node("Add", [mean, graph.number(f"{name}.epsilon", epsilon)], [f"{name}.shifted"])
    root = graph.node("Sqrt", [shifted], [f"{name}.root"])
    ratio = graph.node("Div", [wide, root], [f"{name}.ratio"])
    return graph.node("Mul", [from_float32(graph, ratio, f"{name}.scaled"), weight], [name])
