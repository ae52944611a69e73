"""Rules for a graph that TensorRT runs in int8: which products are quantised, and how their pairs look."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from onnx import TensorProto, numpy_helper

from export.graph.rules import Fault, Rule, Subject, input_name, integer_attribute, type_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx

# The entry of a graph's metadata that lists the products left in float16, with what quantising each alone would lose.
UNQUANTIZED_KEY: Final = "unquantized"
_KINDS: Final = ("QuantizeLinear", "DequantizeLinear")


def unquantized(model: onnx.ModelProto) -> dict[str, Any]:
    """The figures of the products that were left in float16, by the node's name."""
    listed = next((entry.value for entry in model.metadata_props if entry.key == UNQUANTIZED_KEY), "{}")
    found: dict[str, Any] = json.loads(listed)
    return found


def _products(subject: Subject) -> Iterator[Fault]:
    producers = subject.producers()
    try:
        listed = unquantized(subject.model)
    except ValueError:
        yield Fault(UNQUANTIZED_KEY, "is metadata that cannot be read")
        return
    products = [node for node in subject.nodes if node.op_type == "MatMul"]
    for node in products:
        plain = [name for name in node.input if name not in producers or producers[name].op_type != "DequantizeLinear"]
        if node.name not in listed and plain:
            yield Fault(node.name, f"multiplies with {plain[0]!r} as it is")
        elif node.name in listed and len(plain) != len(node.input):
            yield Fault(node.name, "is quantised though it is listed")
    for name in listed.keys() - {node.name for node in products}:
        yield Fault(name, "is listed and no product")
    for name, figures in listed.items():
        if not isinstance(figures, dict) or not {"mean_kl", "perplexity_ratio"} <= figures.keys():
            yield Fault(name, "is listed without what it would lose")
    head = subject.head()
    for node in subject.nodes:
        if node.op_type == "Gemm" and node is not head:
            yield Fault(node.name, "is a product that cannot be quantised: make it a MatMul")


def _pairs(subject: Subject) -> Iterator[Fault]:
    producers, consumers = subject.producers(), _consumers(subject)
    for node in subject.nodes:
        if node.op_type == "QuantizeLinear":
            if [consumer.op_type for consumer in consumers.get(node.output[0], [])] != ["DequantizeLinear"]:
                yield Fault(node.name, "is not followed by just one DequantizeLinear")
        elif node.op_type == "DequantizeLinear":
            quantizer = producers.get(node.input[0])
            if quantizer is None or quantizer.op_type != "QuantizeLinear":
                yield Fault(node.name, "does not follow a QuantizeLinear")
            elif _parameters(quantizer) != _parameters(node):
                yield Fault(node.name, f"undoes {_parameters(quantizer)} with {_parameters(node)}")
            elif [consumer.op_type for consumer in consumers.get(node.output[0], [])] != ["MatMul"]:
                yield Fault(node.name, "does not feed just one product")


def _zero_points(subject: Subject) -> Iterator[Fault]:
    for node in subject.nodes:
        if node.op_type not in _KINDS:
            continue
        zeros = subject.initializers.get(input_name(node, 2))
        if zeros is None or zeros.data_location == TensorProto.EXTERNAL:
            yield Fault(node.name, "has no zero point in the graph")
        elif zeros.data_type != TensorProto.INT8:
            yield Fault(node.name, f"has a zero point in {type_name(zeros.data_type)}")
        elif numpy_helper.to_array(zeros).any():
            yield Fault(node.name, "has a zero point that is not 0")


def _scales(subject: Subject) -> Iterator[Fault]:
    for node in subject.nodes:
        if node.op_type != "QuantizeLinear":
            continue
        scales = subject.initializers.get(node.input[1])
        if scales is None or scales.data_location == TensorProto.EXTERNAL:
            yield Fault(node.name, "has no scale in the graph")
            continue
        weight = subject.initializers.get(node.input[0])
        wanted = 1 if weight is None else weight.dims[-1]
        values = numpy_helper.to_array(scales)
        if scales.data_type != subject.float_type:
            yield Fault(node.name, f"has a scale in {type_name(scales.data_type)}")
        elif math.prod(scales.dims) != wanted:
            yield Fault(node.name, f"has {math.prod(scales.dims)} scales where {wanted} belong")
        elif weight is not None and integer_attribute(node, "axis", 1) % len(weight.dims) != len(weight.dims) - 1:
            yield Fault(node.name, f"scales along axis {integer_attribute(node, 'axis', 1)}")
        elif not (np.isfinite(values).all() and (values >= np.finfo(values.dtype).tiny).all()):
            yield Fault(node.name, f"has scales from {values.min():g} to {values.max():g}")


def _consumers(subject: Subject) -> dict[str, list[onnx.NodeProto]]:
    consumers: dict[str, list[onnx.NodeProto]] = {}
    for node in subject.nodes:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    return consumers


def _parameters(node: onnx.NodeProto) -> tuple[str, str, int]:
    return input_name(node, 1), input_name(node, 2), integer_attribute(node, "axis", 1)


QDQ_RULES: Final[tuple[tuple[str, Rule], ...]] = (
    ("every product is quantised, or listed with the loss that kept it out", _products),
    ("a pair quantises one input of one product", _pairs),
    ("TensorRT takes symmetric int8 alone", _zero_points),
    ("an activation has one scale and a weight one for each output, all of them normal numbers above 0", _scales),
)
