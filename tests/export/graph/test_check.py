"""Every rule passes what is built, and rejects the graph that breaks just it, by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.errors import ExportError
from export.graph.check import check_graph
from export.graph.weights import CUDA_KERNELS, cuda
from export.graphs import build_graph
from tests.export.graph.conftest import CONFIGS, FORMATS, Built

Get = Callable[[str], Built]
LINEAR = "layers.0.self_attn.qkv_proj"


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def value(model: onnx.ModelProto, name: str) -> onnx.ValueInfoProto:
    return next(value for value in [*model.graph.input, *model.graph.output] if value.name == name)


def attribute(model: onnx.ModelProto, name: str, key: str) -> onnx.AttributeProto:
    return next(attribute for attribute in node(model, name).attribute if attribute.name == key)


def tensor(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_built_passes(kind: str, target: str, built: Get) -> None:
    graphs = built(kind)
    check_graph(graphs.proto(target), FORMATS[target], graphs.dims)


def add_if(model: onnx.ModelProto) -> None:
    branch = helper.make_graph([], "branch", [], [])
    model.graph.node.append(helper.make_node("If", ["wanted"], ["o"], name="choice", then_branch=branch))


def add_custom_graph(model: onnx.ModelProto) -> None:
    body = helper.make_graph([], "body", [], [])
    model.graph.node.append(helper.make_node("Repeat", [], ["o"], name="choice", domain="com.microsoft", body=body))


def add_shape(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Shape", ["input_ids"], ["o"], name="length"))


def add_nonzero(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("NonZero", ["input_ids"], ["o"], name="length"))


def add_sin(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Sin", ["embed_tokens"], ["o"], name="wave"))


def newer_opset(model: onnx.ModelProto) -> None:
    next(entry for entry in model.opset_import if not entry.domain).version = 21


def last_maximum(model: onnx.ModelProto) -> None:
    node(model, "next_token_ids").attribute.append(helper.make_attribute("select_last_index", 1))


def computed_total(model: onnx.ModelProto) -> None:
    node(model, "layer.0.attention").input[6] = "seqlens_k"


def total_on_device(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Add", ["seqlens_k", "total_sequence_length"], ["o"], name="sum"))


def computed_slice(model: onnx.ModelProto) -> None:
    cut = next(node for node in model.graph.node if node.op_type == "Slice")
    cut.name = "cut"
    cut.input[2] = "logit_indices"


def unequal_split(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array([60, 4]), "sizes"))
    model.graph.node.append(helper.make_node("Split", ["embed_tokens", "sizes"], ["o", "p"], name="cut", axis=-1))


def undeclared_rows(model: onnx.ModelProto) -> None:
    value(model, "next_token_ids").type.tensor_type.shape.dim[1].Clear()


def rows_from_nowhere(model: onnx.ModelProto) -> None:
    value(model, "next_token_ids").type.tensor_type.shape.dim[1].dim_param = "found"


def fused_bias(model: onnx.ModelProto) -> None:
    node(model, LINEAR).input.extend(["", "", "norm.weight"])


def zero_points(model: onnx.ModelProto) -> None:
    node(model, LINEAR).input.append("zeros")


def group_index(model: onnx.ModelProto) -> None:
    node(model, LINEAR).input.extend(["", "groups"])


def odd_outputs(model: onnx.ModelProto) -> None:
    attribute(model, LINEAR, "N").i = 100


def unpadded_head(model: onnx.ModelProto) -> None:
    attribute(model, "head.scores", "N").i = 400


def float32_scales(model: onnx.ModelProto) -> None:
    tensor(model, f"{LINEAR}.scales").data_type = TensorProto.FLOAT


def float32_norm(model: onnx.ModelProto) -> None:
    norm = tensor(model, "norm.weight")
    norm.CopyFrom(numpy_helper.from_array(np.ones(64, np.float32), norm.name))


def computed_scales(model: onnx.ModelProto) -> None:
    node(model, LINEAR).input[2] = "embed_tokens"


def missing_present(model: onnx.ModelProto) -> None:
    model.graph.output.remove(value(model, "present_value.1"))


def open_length(model: onnx.ModelProto) -> None:
    value(model, "past_key.1").type.tensor_type.shape.dim[2].dim_param = "length"


def longer_present(model: onnx.ModelProto) -> None:
    value(model, "present_key.0").type.tensor_type.shape.dim[2].dim_value = 65


def fixed_batch(model: onnx.ModelProto) -> None:
    value(model, "past_value.0").type.tensor_type.shape.dim[0].dim_value = 1


def wrong_cache_type(model: onnx.ModelProto) -> None:
    elem = value(model, "past_key.0").type.tensor_type
    elem.elem_type = TensorProto.FLOAT if elem.elem_type == TensorProto.FLOAT16 else TensorProto.FLOAT16


def crossed_layers(model: onnx.ModelProto) -> None:
    node(model, "layer.0.attention").output[1] = "present_key.1"


def unread_cache(model: onnx.ModelProto) -> None:
    model.graph.node.remove(node(model, "layer.1.attention"))


def half_logits(model: onnx.ModelProto) -> None:
    value(model, "logits").type.tensor_type.elem_type = TensorProto.FLOAT16


def padded_logits(model: onnx.ModelProto) -> None:
    value(model, "logits").type.tensor_type.shape.dim[2].dim_value = 448


def loose_logits(model: onnx.ModelProto) -> None:
    model.graph.node.remove(node(model, "head.scores"))


Mutation = Callable[[onnx.ModelProto], None]
CUDA_MUTATIONS: list[tuple[Mutation, str, str]] = [
    (add_if, "choice", "control flow"),
    (add_custom_graph, "choice", "control flow"),
    (add_shape, "length", "no shape may be computed"),
    (add_nonzero, "length", "no shape may be computed"),
    (add_sin, "wave", "is Sin-7, but every node needs a CUDA kernel"),
    (newer_opset, "logits", "is Cast-21, but every node needs a CUDA kernel of just its version"),
    (last_maximum, "next_token_ids", "select_last_index"),
    (computed_total, "layer.0.attention", "reads 'seqlens_k' on the processor"),
    (total_on_device, "sum", "reads 'total_sequence_length' on the device"),
    (computed_slice, "cut", "reads 'logit_indices' on the processor"),
    (unequal_split, "cut", "splits into [60, 4], but CUDA's Split copies"),
    (undeclared_rows, "next_token_ids", "['batch', '?'], but the inputs' shapes give every other"),
    (rows_from_nowhere, "next_token_ids", "['batch', 'found']"),
    (fused_bias, LINEAR, "refuses a bias"),
    (zero_points, LINEAR, "symmetric"),
    (group_index, LINEAR, "symmetric"),
    (odd_outputs, LINEAR, "100 outputs, no multiple of 8"),
    (unpadded_head, "head.scores", "400 rows, no multiple of 64"),
    (float32_scales, LINEAR, "in float, but scales, norms and biases"),
    (float32_norm, "norm", "'norm.weight' in float"),
    (computed_scales, LINEAR, "computes its scales"),
    (missing_present, "present_value.1", "not declared"),
    (open_length, "past_key.1", "['batch', 2, 'length', 16], but the cache is"),
    (longer_present, "present_key.0", "['batch', 2, 65, 16]"),
    (fixed_batch, "past_value.0", "[1, 2, 64, 16]"),
    (wrong_cache_type, "past_key.0", "of float"),
    (crossed_layers, "layer.0.attention", "appends to its own cache"),
    (unread_cache, "past_key.1", "appends to its own cache"),
    (half_logits, "logits", "of float16"),
    (padded_logits, "logits", "448 columns"),
    (loose_logits, "logits", "comes from no matrix"),
]
CPU_MUTATIONS: list[tuple[str, Mutation, str, str]] = [
    ("cpu-int8", add_shape, "length", "only the target's operators"),
    ("cpu-int8", add_sin, "wave", "only the target's operators"),
    ("cpu-fp32", add_if, "choice", "only the target's operators"),
    ("cpu-fp32", add_custom_graph, "choice", "com.microsoft.Repeat"),
    ("cpu-int8", zero_points, LINEAR, "symmetric"),
    ("cpu-int8", computed_scales, LINEAR, "computes its scales"),
    ("cpu-int8", longer_present, "present_key.0", "['batch', 2, 65, 16]"),
    ("cpu-fp32", open_length, "past_key.1", "'length'"),
    ("cpu-fp32", wrong_cache_type, "past_key.0", "of float16"),
    ("cpu-fp32", crossed_layers, "layer.0.attention", "appends to its own cache"),
    ("cpu-int8", padded_logits, "logits", "448 columns"),
]


def assert_rejected(graphs: Built, target: str, mutate: Mutation, name: str, words: str) -> None:
    model = graphs.proto(target)
    mutate(model)
    with pytest.raises(ExportError, match=re.escape(words)) as caught:
        check_graph(model, FORMATS[target], graphs.dims)
    assert str(caught.value).startswith(f"{target} graph: {name!r} ")


@pytest.mark.parametrize(
    ("mutate", "name", "words"), CUDA_MUTATIONS, ids=[mutate.__name__ for mutate, _, _ in CUDA_MUTATIONS]
)
def test_a_cuda_graph_that_breaks_a_rule_is_rejected(mutate: Mutation, name: str, words: str, built: Get) -> None:
    assert_rejected(built("llama"), "cuda", mutate, name, words)


@pytest.mark.parametrize(
    ("target", "mutate", "name", "words"),
    CPU_MUTATIONS,
    ids=[f"{target}-{mutate.__name__}" for target, mutate, _, _ in CPU_MUTATIONS],
)
def test_a_cpu_graph_that_breaks_a_rule_is_rejected(
    target: str, mutate: Mutation, name: str, words: str, built: Get
) -> None:
    assert_rejected(built("llama"), target, mutate, name, words)


def test_a_target_keeps_to_its_own_operators(built: Get) -> None:
    graphs = built("llama")
    for target, other, name in (("cpu-fp32", "cpu-int8", "embed_tokens"), ("cpu-int8", "cpu-fp32", LINEAR)):
        with pytest.raises(ExportError, match=f"'{name}.*only the target's operators"):
            check_graph(graphs.proto(other), FORMATS[target], graphs.dims)


def test_building_checks_the_graph(built: Get, tmp_path: Path) -> None:
    graphs = built("gpt2")
    picky = replace(cuda(), kernels=replace(CUDA_KERNELS, output_multiple=40))
    with pytest.raises(ExportError, match=r"'h\.0\.attn\.c_attn\.product' has 144 outputs, no multiple of 40"):
        build_graph(graphs.checkpoint, picky, graphs.dims, tmp_path / "graph")
