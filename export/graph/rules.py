"""What a rule for graphs is given and what it says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import onnx
from onnx import TensorProto, helper

from edge_llm.bundle import graph_io

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from edge_llm.bundle.manifest import ModelDims
    from export.graph.weights import WeightFormat


class Fault(NamedTuple):
    """What breaks a rule: a node's or a value's name, and in which way."""

    name: str
    what: str


@dataclass(frozen=True)
class Subject:
    """A graph with what it is meant to be.

    Attributes:
        model: without its external data.
        weights: the target.
        dims: the model's shape.
        initializers: by name.
    """

    model: onnx.ModelProto
    weights: WeightFormat
    dims: ModelDims
    initializers: Mapping[str, TensorProto]

    @property
    def nodes(self) -> list[onnx.NodeProto]:
        """In the graph's order."""
        return list(self.model.graph.node)

    @property
    def float_type(self) -> int:
        """The target's own element type."""
        return helper.np_dtype_to_tensor_dtype(np.dtype(self.weights.float_type))

    def producers(self) -> dict[str, onnx.NodeProto]:
        """The node that each value comes from."""
        return {output: node for node in self.nodes for output in node.output if output}

    def head(self) -> onnx.NodeProto | None:
        """The node that the logits come from, whatever reshapes them after it."""
        producers = self.producers()
        node = producers.get(graph_io.LOGITS)
        while node is not None and node.op_type in ("Cast", "Slice", "Reshape"):
            node = producers.get(node.input[0])
        return node

    def matmuls(self) -> list[onnx.NodeProto]:
        """The quantised matrices' nodes."""
        return [node for node in self.nodes if node.op_type == "MatMulNBits"]


Rule: TypeAlias = "Callable[[Subject], Iterator[Fault]]"


def operator_version(node: onnx.NodeProto, opset: int) -> int:
    """The version of the operator that the graph's opset means; 1 for ONNX Runtime's own operators."""
    if node.domain or not onnx.defs.has(node.op_type):
        return 1
    return int(onnx.defs.get_schema(node.op_type, opset).since_version)


def input_name(node: onnx.NodeProto, place: int) -> str:
    """The input at a place, empty if the node leaves it out."""
    return str(node.input[place]) if place < len(node.input) else ""


def integer_attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    """An attribute's value, or the default if the node leaves it out."""
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == name), default)


def spelled(node: onnx.NodeProto) -> str:
    """The operator with its domain, as messages name it."""
    return f"{node.domain}.{node.op_type}" if node.domain else str(node.op_type)


def type_name(data_type: int) -> str:
    """An element type, as messages name it."""
    return str(TensorProto.DataType.Name(data_type)).lower()


def sizes(value: onnx.ValueInfoProto) -> list[int | str]:
    """A tensor's dimensions: a number, a symbol, or ``"?"`` where nothing is declared."""
    return [dim.dim_value or dim.dim_param or "?" for dim in value.type.tensor_type.shape.dim]
