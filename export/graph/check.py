"""What a target's graph may consist of: checked on every graph that was built, before it is packaged.

A graph that breaks a rule may still load and answer rightly, only slower, or only on another provider than its own.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from onnx import AttributeProto, TensorProto, numpy_helper

from edge_llm.bundle import graph_io
from export.errors import ExportError
from export.graph.check_qdq import QDQ_RULES
from export.graph.check_static import STATIC_OPERATORS, STATIC_RULES
from export.graph.rules import (
    Fault,
    Rule,
    Subject,
    input_name,
    integer_attribute,
    operator_version,
    sizes,
    spelled,
    type_name,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx

    from edge_llm.bundle.manifest import ModelDims
    from export.graph.weights import WeightFormat

_CONTRIB: Final = "com.microsoft"
# Operators and the version of each that the CUDA provider registers, from onnxruntime's docs/OperatorKernels.md at
# 001d12d (between September 2025 and March 2026). Contrib operators have one version. A kernel is found only if its
# version is the operator's own at the graph's opset (VerifyVersion in kernel_registry.cc); otherwise the node runs on
# the processor, between two copies, and the graph cannot be captured.
_CUDA_KERNELS: Final[dict[tuple[str, str], int]] = {
    ("", "Add"): 14,
    # Since 1.21 (pull request 22713), but for select_last_index.
    ("", "ArgMax"): 13,
    # 21 is there as well, but not surely in 1.23.
    ("", "Cast"): 19,
    ("", "Gather"): 13,
    ("", "Gelu"): 20,
    ("", "LayerNormalization"): 17,
    ("", "Mul"): 14,
    ("", "Relu"): 14,
    ("", "SimplifiedLayerNormalization"): 1,
    ("", "Slice"): 13,
    ("", "Split"): 18,
    (_CONTRIB, "FastGelu"): 1,
    (_CONTRIB, "GroupQueryAttention"): 1,
    (_CONTRIB, "MatMulNBits"): 1,
    (_CONTRIB, "QuickGelu"): 1,
    (_CONTRIB, "SkipLayerNormalization"): 1,
    (_CONTRIB, "SkipSimplifiedLayerNormalization"): 1,
}
# What the layers, the norms and the head of every CPU form are made of.
_CPU_OPERATORS: Final = frozenset(
    {("", name) for name in ("Add", "ArgMax", "Gather", "Gelu", "LayerNormalization", "Mul", "Relu")}
    | {("", "SimplifiedLayerNormalization"), ("", "Split")}
    | {(_CONTRIB, name) for name in ("FastGelu", "GroupQueryAttention", "QuickGelu")}
    | {(_CONTRIB, "SkipLayerNormalization"), (_CONTRIB, "SkipSimplifiedLayerNormalization")}
)
_OPERATORS: Final[dict[str, frozenset[tuple[str, str]]]] = {
    "cpu-int8": _CPU_OPERATORS | {("", "Reshape"), (_CONTRIB, "GatherBlockQuantized"), (_CONTRIB, "MatMulNBits")},
    "cpu-fp32": _CPU_OPERATORS | {("", "MatMul"), (_CONTRIB, "FusedMatMul")},
    "cuda": frozenset(_CUDA_KERNELS),
    **STATIC_OPERATORS,
}
# Inputs that a CUDA kernel reads on the processor, by their place: OrtMemTypeCPUInput where onnxruntime
# registers it. Stored numbers are kept there; what a node computes would be copied back in the middle of a step.
_READ_ON_PROCESSOR: Final = {"GroupQueryAttention": (6,), "Slice": (1, 2, 3, 4), "Split": (1,)}
_CONTROL_FLOW: Final = frozenset({"If", "Loop", "Scan", "SequenceMap"})
_SHAPE_OPERATORS: Final = frozenset(
    {"Shape", "Size", "NonZero", "ConstantOfShape", "Range", "Expand", "Tile", "Reshape", "Unique", "Compress"}
)
_FLOATS: Final = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE})
# Inputs of MatMulNBits by their place.
_SCALES, _ZERO_POINTS, _GROUP_INDEX, _BIAS = 2, 3, 4, 5


def check_graph(model: onnx.ModelProto, weights: WeightFormat, dims: ModelDims) -> None:
    """Check a graph against every rule of its target.

    Args:
        model: the graph; its external data need not be loaded.
        weights: the target that it was built for.
        dims: the model's shape.

    Raises:
        ExportError: naming the first node, or input or output, that breaks a rule, and the rule.
    """
    subject = Subject(model, weights, dims, {tensor.name: tensor for tensor in model.graph.initializer})
    for words, rule in _rules(weights):
        for fault in rule(subject):
            raise ExportError(
                f"{weights.target} graph: {fault.name!r} {fault.what}, but {words}; leave {weights.target} out of "
                f"--target, and report it if this model should fit"
            )


def _rules(weights: WeightFormat) -> tuple[tuple[str, Rule], ...]:
    if weights.is_static:
        return (*_NO_CONTROL_FLOW, *_COMMON_RULES, *(QDQ_RULES if weights.is_qdq else ()), *STATIC_RULES)
    own = (*_CUDA_RULES, *_COMMON_RULES) if weights.target == "cuda" else _COMMON_RULES
    return (*own, *_GQA_RULES)


def _control_flow(subject: Subject) -> Iterator[Fault]:
    for node in subject.nodes:
        has_graph = any(attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for attribute in node.attribute)
        if has_graph or node.op_type in _CONTROL_FLOW:
            yield Fault(node.name, f"is control flow ({node.op_type})")


def _shape_operators(subject: Subject) -> Iterator[Fault]:
    for node in subject.nodes:
        if node.op_type in _SHAPE_OPERATORS:
            yield Fault(node.name, f"computes with shapes ({node.op_type})")


def _cuda_kernels(subject: Subject) -> Iterator[Fault]:
    opset = next(entry.version for entry in subject.model.opset_import if not entry.domain)
    for node in subject.nodes:
        version = operator_version(node, opset)
        if _CUDA_KERNELS.get((node.domain, node.op_type)) != version:
            yield Fault(node.name, f"is {spelled(node)}-{version}")
        elif node.op_type == "ArgMax" and integer_attribute(node, "select_last_index", 0):
            yield Fault(node.name, "is ArgMax with select_last_index")


def _processor_inputs(subject: Subject) -> Iterator[Fault]:
    stays = {*subject.initializers, graph_io.TOTAL_SEQUENCE_LENGTH, ""}
    for node in subject.nodes:
        places = _READ_ON_PROCESSOR.get(node.op_type, ())
        for place, name in enumerate(node.input):
            if place in places and name not in stays:
                yield Fault(node.name, f"reads {name!r} on the processor")
            elif place not in places and name == graph_io.TOTAL_SEQUENCE_LENGTH:
                yield Fault(node.name, f"reads {name!r} on the device")


def _equal_parts(subject: Subject) -> Iterator[Fault]:
    for node in subject.nodes:
        stored = subject.initializers.get(input_name(node, 1)) if node.op_type == "Split" else None
        if stored is not None and len(set(numpy_helper.to_array(stored).tolist())) > 1:
            yield Fault(node.name, f"splits into {numpy_helper.to_array(stored).tolist()}")


def _open_dimensions(subject: Subject) -> Iterator[Fault]:
    given = {dim for value in subject.model.graph.input for dim in sizes(value)}
    for value in (*subject.model.graph.input, *subject.model.graph.output):
        for dim in sizes(value):
            if dim == "?" or (isinstance(dim, str) and dim not in given):
                yield Fault(value.name, f"has the shape {sizes(value)}")


def _no_bias_input(subject: Subject) -> Iterator[Fault]:
    for node in subject.matmuls():
        if input_name(node, _BIAS):
            yield Fault(node.name, "takes its bias as an input")


def _operators(subject: Subject) -> Iterator[Fault]:
    for node in subject.nodes:
        if (node.domain, node.op_type) not in _OPERATORS[subject.weights.target]:
            yield Fault(node.name, f"is {spelled(node)}")


def _symmetric(subject: Subject) -> Iterator[Fault]:
    for node in subject.matmuls():
        if input_name(node, _ZERO_POINTS) or input_name(node, _GROUP_INDEX):
            yield Fault(node.name, "has zero points or a group index")


def _output_multiple(subject: Subject) -> Iterator[Fault]:
    multiple = subject.weights.kernels.output_multiple
    for node in subject.matmuls():
        outputs = integer_attribute(node, "N", 0)
        if outputs % multiple:
            yield Fault(node.name, f"has {outputs} outputs, no multiple of {multiple}")


def _head_multiple(subject: Subject) -> Iterator[Fault]:
    node = subject.head()
    multiple = subject.weights.kernels.vocabulary_multiple
    if node is None:
        yield Fault(graph_io.LOGITS, "comes from no matrix")
        return
    rows = 0
    if node.op_type == "MatMulNBits":
        rows = integer_attribute(node, "N", 0)
    elif node.op_type == "Gemm":
        table = subject.initializers.get(input_name(node, 1))
        rows = table.dims[0] if table is not None else 0
    if multiple > 1 and (not rows or rows % multiple):
        yield Fault(node.name, f"has {rows} rows, no multiple of {multiple}")


def _float_initializers(subject: Subject) -> Iterator[Fault]:
    for node in subject.matmuls():
        if input_name(node, _SCALES) not in subject.initializers:
            yield Fault(node.name, "computes its scales")
    for node in subject.nodes:
        for name in node.input:
            tensor = subject.initializers.get(name)
            # A single number belongs to a formula, which may compute in float32 where float16 would overflow.
            if tensor is None or (subject.weights.is_static and math.prod(tensor.dims) == 1):
                continue
            if tensor.data_type in _FLOATS and tensor.data_type != subject.float_type:
                yield Fault(node.name, f"reads {name!r} in {type_name(tensor.data_type)}")


def _cache(subject: Subject) -> Iterator[Fault]:
    declared = {value.name: value for value in [*subject.model.graph.input, *subject.model.graph.output]}
    dims = subject.dims
    shape = [dims.num_kv_heads, dims.max_seq_len, dims.head_dim]
    for layer in range(dims.num_layers):
        for name in (*graph_io.past_names(layer), *graph_io.present_names(layer)):
            if name not in declared:
                yield Fault(name, "is not declared")
                continue
            tensor = declared[name].type.tensor_type
            batch, *static = tensor.shape.dim
            if not batch.dim_param or [dim.dim_value for dim in static] != shape:
                yield Fault(name, f"has the shape {sizes(declared[name])}")
            if tensor.elem_type != subject.float_type:
                yield Fault(name, f"is of {type_name(tensor.elem_type)}")


def _appends_in_place(subject: Subject) -> Iterator[Fault]:
    pairs = {graph_io.past_names(layer): graph_io.present_names(layer) for layer in range(subject.dims.num_layers)}
    for node in subject.nodes:
        if node.op_type == "GroupQueryAttention" and pairs.pop(tuple(node.input[3:5]), None) != tuple(node.output[1:3]):
            yield Fault(node.name, f"reads {list(node.input[3:5])} and writes {list(node.output[1:3])}")
    for past, _ in pairs:
        yield Fault(past, "is read by no attention")


def _logits(subject: Subject) -> Iterator[Fault]:
    for value in subject.model.graph.output:
        tensor = value.type.tensor_type
        if value.name == graph_io.LOGITS and tensor.elem_type != TensorProto.FLOAT:
            yield Fault(value.name, f"is of {type_name(tensor.elem_type)}")
        if value.name == graph_io.LOGITS and tensor.shape.dim[-1].dim_value != subject.dims.vocab_size:
            yield Fault(value.name, f"has {tensor.shape.dim[-1].dim_value} columns")


_NO_CONTROL_FLOW: Final[tuple[tuple[str, Rule], ...]] = (
    ("a compiled or captured graph has no control flow", _control_flow),
)
_CUDA_RULES: Final[tuple[tuple[str, Rule], ...]] = (
    ("a CUDA graph cannot capture control flow", _control_flow),
    ("no shape may be computed, it would be on the processor", _shape_operators),
    ("every node needs a CUDA kernel of just its version", _cuda_kernels),
    (
        "only total_sequence_length and stored numbers are on the processor, a copy cannot be captured",
        _processor_inputs,
    ),
    ("CUDA's Split copies unequal sizes up in each run, from memory that a replay no longer has", _equal_parts),
    ("the inputs' shapes give every other, a captured step has one shape", _open_dimensions),
    ("CUDA's MatMulNBits refuses a bias, an Add does it", _no_bias_input),
)
_COMMON_RULES: Final[tuple[tuple[str, Rule], ...]] = (
    ("only the target's operators are allowed", _operators),
    ("quantisation is symmetric", _symmetric),
    ("the fast kernel wants that multiple", _output_multiple),
    ("the vocabulary is padded to that multiple", _head_multiple),
    ("scales, norms and biases are stored in the target's float type", _float_initializers),
    ("logits are float32 over the real vocabulary", _logits),
)
_GQA_RULES: Final[tuple[tuple[str, Rule], ...]] = (
    ("the cache is (batch, kv_heads, max_seq_len, head_dim) of the target's float type, batch alone open", _cache),
    ("each layer appends to its own cache", _appends_in_place),
)
