"""Rules for the static forms: what TensorRT's parser takes, and what makes a graph two engines over one cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import onnx

from edge_llm.bundle import graph_io
from export.graph.io import CHUNK_MULTIPLE
from export.graph.rules import Fault, Rule, Subject, input_name, integer_attribute, sizes, type_name

if TYPE_CHECKING:
    from collections.abc import Iterator

_SHARED_OPERATORS: Final = frozenset(
    {"Add", "ArgMax", "Cast", "Concat", "Gather", "Gemm", "LayerNormalization", "LessOrEqual", "MatMul", "Mul"}
    | {"Relu", "Reshape", "Sigmoid", "Slice", "Split", "Sub", "Transpose"}
)
_SCATTER_OPERATORS: Final = _SHARED_OPERATORS | {"Attention", "Gelu", "RMSNormalization", "TensorScatter"}
# From docs/operators.md of onnx-tensorrt: that of 10.15 for ``tensorrt``. For ``tensorrt-primitive`` that of 8.5, whose
# operators 10.3 has all, and LayerNormalization, which the release notes of 8.6 ask for in its stead of its parts.
STATIC_OPERATORS: Final[dict[str, frozenset[tuple[str, str]]]] = {
    target: frozenset(("", name) for name in names)
    for target, names in (
        ("tensorrt", _SCATTER_OPERATORS),
        ("tensorrt-int8", _SCATTER_OPERATORS | {"DequantizeLinear", "QuantizeLinear"}),
        ("tensorrt-primitive", _SHARED_OPERATORS | {"Div", "Erf", "ReduceMean", "Softmax", "Sqrt", "Where"}),
    )
}
_ATTENTION_INPUTS: Final = 4


def _opset(subject: Subject) -> Iterator[Fault]:
    for entry in subject.model.opset_import:
        if entry.domain:
            yield Fault(entry.domain, "is imported")
        elif entry.version != subject.weights.kernels.opset:
            yield Fault("opset", f"is {entry.version}")
    for node in subject.nodes:
        if node.domain:
            yield Fault(node.name, f"is of the domain {node.domain}")


def _static_shapes(subject: Subject) -> Iterator[Fault]:
    """Every declared dimension, and every one that follows from them."""
    graph = onnx.shape_inference.infer_shapes(subject.model, data_prop=True).graph
    declared = [*graph.input, *graph.output]
    for value in declared:
        if not _is_static(value):
            yield Fault(value.name, f"has the shape {sizes(value)}")
    known = {value.name: value for value in [*declared, *graph.value_info]}
    for node in subject.nodes:
        for name in filter(None, node.output):
            if name not in known or not known[name].type.tensor_type.HasField("shape"):
                yield Fault(node.name, "has an output whose shape does not follow from the inputs")
            elif not _is_static(known[name]):
                yield Fault(node.name, f"has an output of the shape {sizes(known[name])}")


def _tokens(subject: Subject) -> Iterator[Fault]:
    declared = {value.name: sizes(value) for value in subject.model.graph.input}
    tokens = declared.get(graph_io.INPUT_IDS, [])[-1:]
    if not tokens or not isinstance(tokens[0], int) or (tokens[0] != 1 and tokens[0] % CHUNK_MULTIPLE):
        yield Fault(graph_io.INPUT_IDS, f"has the shape {declared.get(graph_io.INPUT_IDS)}")
    if declared.get(graph_io.POSITION_IDS) != declared.get(graph_io.INPUT_IDS):
        yield Fault(graph_io.POSITION_IDS, f"has the shape {declared.get(graph_io.POSITION_IDS)}")


def _cache(subject: Subject) -> Iterator[Fault]:
    declared = {value.name: value for value in [*subject.model.graph.input, *subject.model.graph.output]}
    dims = subject.dims
    whole = [1, dims.num_kv_heads, dims.max_seq_len, dims.head_dim]
    tokens = sizes(declared[graph_io.INPUT_IDS])[-1]
    new = [1, dims.num_kv_heads, tokens, dims.head_dim]
    outputs = (
        (graph_io.present_names, whole) if subject.weights.kernels.form == "scatter" else (graph_io.new_names, new)
    )
    for layer in range(dims.num_layers):
        for names, shape in ((graph_io.past_names, whole), outputs):
            for name in names(layer):
                if name not in declared:
                    yield Fault(name, "is not declared")
                elif sizes(declared[name]) != shape:
                    yield Fault(name, f"has the shape {sizes(declared[name])}")
                elif declared[name].type.tensor_type.elem_type != subject.float_type:
                    yield Fault(name, f"is of {type_name(declared[name].type.tensor_type.elem_type)}")


def _scatters_in_place(subject: Subject) -> Iterator[Fault]:
    if subject.weights.kernels.form != "scatter":
        return
    layers = range(subject.dims.num_layers)
    pairs = {
        past: present
        for layer in layers
        for past, present in zip(graph_io.past_names(layer), graph_io.present_names(layer), strict=True)
    }
    for node in subject.nodes:
        past, present = input_name(node, 0), node.output[0]
        if node.op_type == "TensorScatter":
            if pairs.pop(past, None) != present or input_name(node, 2) != graph_io.WRITE_INDEX:
                yield Fault(node.name, f"writes {past!r} to {present!r} at {input_name(node, 2)!r}")
        else:
            for name in node.input:
                if name in pairs:
                    yield Fault(node.name, f"reads {name!r} before it is written")
    for past in pairs:
        yield Fault(past, "is never written")


def _reads_only(subject: Subject) -> Iterator[Fault]:
    """The cache enters products alone: whatever else read it would copy it, every step."""
    if subject.weights.kernels.form != "primitive":
        return
    read = dict.fromkeys(
        (name for layer in range(subject.dims.num_layers) for name in graph_io.past_names(layer)), False
    )
    for node in subject.nodes:
        for name in node.input:
            if name in read:
                read[name] = True
                if node.op_type not in ("MatMul", "Transpose"):
                    yield Fault(node.name, f"reads {name!r} as {node.op_type}")
    for name, is_read in read.items():
        if not is_read:
            yield Fault(name, "is read by nothing")


def _parser(subject: Subject) -> Iterator[Fault]:
    for node in subject.nodes:
        outputs = [name for name in node.output if name]
        if node.op_type == "Attention":
            given = [name for name in node.input if name]
            if len(given) != _ATTENTION_INPUTS or len(node.input) != _ATTENTION_INPUTS:
                yield Fault(node.name, f"has the inputs {given}")
            if len(outputs) != 1:
                yield Fault(node.name, f"has the outputs {outputs}")
            if integer_attribute(node, "is_causal", 0):
                yield Fault(node.name, "is causal beside its mask")
        elif node.op_type == "TensorScatter" and integer_attribute(node, "axis", -2) != -2:
            yield Fault(node.name, f"scatters along axis {integer_attribute(node, 'axis', -2)}")
        elif node.op_type in ("LayerNormalization", "RMSNormalization") and len(outputs) != 1:
            yield Fault(node.name, f"has the outputs {outputs}")
        elif node.op_type == "ReduceMean" and len(node.input) != 1:
            yield Fault(node.name, "takes its axes as an input")


def _is_static(value: onnx.ValueInfoProto) -> bool:
    return all(isinstance(size, int) and size > 0 for size in sizes(value))


STATIC_RULES: Final[tuple[tuple[str, Rule], ...]] = (
    ("only the default domain, of the target's opset, is allowed", _opset),
    ("a chunk is one token or a multiple of 8, with a position for each", _tokens),
    ("past and present are (1, kv_heads, max_seq_len, head_dim), new rows have the chunk's length", _cache),
    ("each layer writes to its own cache, and attends over what it wrote", _scatters_in_place),
    ("a cache that is only read enters nothing but products", _reads_only),
    ("TensorRT's parser takes nothing else", _parser),
    ("every dimension is static", _static_shapes),
)
