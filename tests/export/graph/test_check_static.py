"""Every rule for the static forms passes what is built, and rejects the graph that breaks just it, by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.checkpoints import load_checkpoint
from export.errors import ExportError
from export.graph.check import check_graph
from export.graph.weights import WeightFormat, tensorrt, tensorrt_primitive
from export.graphs import build_graph
from tests.export.graph.test_check import (
    add_custom_graph,
    add_if,
    add_sin,
    attribute,
    half_logits,
    node,
    padded_logits,
    tensor,
    value,
)
from tests.export.models import llama_config, random_model, save

FORMATS: dict[str, WeightFormat] = {weights.target: weights for weights in (tensorrt(), tensorrt_primitive())}
FILES = ("model.onnx", "prefill.onnx")


class Graphs:
    def __init__(self, folder: Path) -> None:
        checkpoint = load_checkpoint(str(save(random_model(llama_config()), folder / "model")))
        self.dims = checkpoint.architecture.dims(72)
        self.folder = folder
        for target, weights in FORMATS.items():
            build_graph(checkpoint, weights, self.dims, folder / target)

    def proto(self, target: str, file: str = "prefill.onnx") -> onnx.ModelProto:
        return onnx.load(str(self.folder / target / file), load_external_data=False)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    return Graphs(tmp_path_factory.mktemp("static"))


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("target", FORMATS)
def test_what_is_built_passes(target: str, file: str, graphs: Graphs) -> None:
    check_graph(graphs.proto(target, file), FORMATS[target], graphs.dims)


def contrib_import(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def other_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version += 1


def loop(model: onnx.ModelProto) -> None:
    body = helper.make_graph([], "body", [], [])
    model.graph.node.append(helper.make_node("Loop", ["", ""], [], name="turns", body=body))


def swish(model: onnx.ModelProto) -> None:
    node(model, "layers.0.mlp.silu").op_type = "Swish"


def open_batch(model: onnx.ModelProto) -> None:
    value(model, "past_value.0").type.tensor_type.shape.dim[0].dim_param = "batch"


def open_tokens(model: onnx.ModelProto) -> None:
    for name in ("input_ids", "position_ids"):
        value(model, name).type.tensor_type.shape.dim[1].dim_param = "seq"


def odd_tokens(model: onnx.ModelProto) -> None:
    for name in ("input_ids", "position_ids"):
        value(model, name).type.tensor_type.shape.dim[1].dim_value = 30


def other_positions(model: onnx.ModelProto) -> None:
    value(model, "position_ids").type.tensor_type.shape.dim[1].dim_value = 8


def open_rows(model: onnx.ModelProto) -> None:
    value(model, "logit_indices").type.tensor_type.shape.dim[0].dim_param = "n"


def undeclared_rows(model: onnx.ModelProto) -> None:
    value(model, "logit_indices").type.tensor_type.shape.dim[0].Clear()


def computed_shape(model: onnx.ModelProto) -> None:
    """A shape that only running tells: everything behind it is unknown."""
    reshape = node(model, "layer.0.rows")
    casts = [
        helper.make_node("Cast", ["position_ids"], ["wide"], name="wide", to=TensorProto.FLOAT),
        helper.make_node("Cast", ["wide"], ["narrow"], name="narrow", to=TensorProto.INT64),
        helper.make_node("Slice", ["narrow", "shape.1", "shape.5", "shape.1"], ["asked"], name="asked"),
        helper.make_node("Reshape", ["asked", "shape.4"], ["target"], name="target"),
    ]
    for number in (1, 4, 5):
        constant = numpy_helper.from_array(np.array([number]), f"shape.{number}")
        model.graph.initializer.append(constant)
    place = list(model.graph.node).index(reshape)
    for offset, cast in enumerate(casts):
        model.graph.node.insert(place + offset, cast)
    node(model, "layer.0.rows").input[1] = "target"


def longer_past(model: onnx.ModelProto) -> None:
    value(model, "past_key.1").type.tensor_type.shape.dim[2].dim_value = 80


def shorter_present(model: onnx.ModelProto) -> None:
    value(model, "present_key.1").type.tensor_type.shape.dim[2].dim_value = 64


def longer_new(model: onnx.ModelProto) -> None:
    value(model, "new_value.1").type.tensor_type.shape.dim[2].dim_value = 72


def float32_past(model: onnx.ModelProto) -> None:
    value(model, "past_key.0").type.tensor_type.elem_type = TensorProto.FLOAT


def missing_present(model: onnx.ModelProto) -> None:
    model.graph.output.remove(value(model, "present_value.1"))


def missing_new(model: onnx.ModelProto) -> None:
    model.graph.output.remove(value(model, "new_value.1"))


def crossed_layers(model: onnx.ModelProto) -> None:
    node(model, "present_key.0").input[0] = "past_key.1"


def written_elsewhere(model: onnx.ModelProto) -> None:
    node(model, "present_key.0").input[2] = "logit_indices"


def read_before(model: onnx.ModelProto) -> None:
    node(model, "layer.1.attention.heads").input[1] = "past_key.1"
    # It is written behind that.
    scatter = node(model, "present_key.1")
    written = onnx.NodeProto()
    written.CopyFrom(scatter)
    model.graph.node.remove(scatter)
    model.graph.node.append(written)


def never_written(model: onnx.ModelProto) -> None:
    model.graph.node.remove(node(model, "present_value.1"))


def other_axis(model: onnx.ModelProto) -> None:
    attribute(model, "present_key.0", "axis").i = 2


def causal(model: onnx.ModelProto) -> None:
    attribute(model, "layer.0.attention.heads", "is_causal").i = 1


def past_of_attention(model: onnx.ModelProto) -> None:
    node(model, "layer.0.attention.heads").input.extend(["present_key.0", "present_value.0"])


def second_output(model: onnx.ModelProto) -> None:
    node(model, "layer.0.attention.heads").output.append("more")


def copied_past(model: onnx.ModelProto) -> None:
    node(model, "layer.0.attention.past_keys").op_type = "Concat"


def unread_past(model: onnx.ModelProto) -> None:
    node(model, "layer.1.attention.past_values").input[1] = "new_value.1"


def axes_input(model: onnx.ModelProto) -> None:
    node(model, "norm.mean").input.append("shape.-1")


def unpadded_head(model: onnx.ModelProto) -> None:
    tensor(model, "embed_tokens.weight").dims[0] = 401


def float32_norm(model: onnx.ModelProto) -> None:
    norm = tensor(model, "norm.weight")
    norm.CopyFrom(numpy_helper.from_array(np.ones(64, np.float32), norm.name))


Mutation = Callable[[onnx.ModelProto], None]
BOTH: list[tuple[Mutation, str, str]] = [
    (add_if, "choice", "no control flow"),
    (loop, "turns", "no control flow"),
    (add_custom_graph, "choice", "no control flow"),
    (add_sin, "wave", "is Sin, but only the target's operators"),
    (swish, "layers.0.mlp.silu", "is Swish, but only the target's operators"),
    (contrib_import, "com.microsoft", "only the default domain"),
    (other_opset, "opset", "only the default domain, of the target's opset"),
    (open_batch, "past_value.0", "['batch', 2, 72, 16]"),
    (open_tokens, "input_ids", "[1, 'seq'], but a chunk is one token or a multiple of 8"),
    (odd_tokens, "input_ids", "[1, 30], but a chunk is one token or a multiple of 8"),
    (other_positions, "position_ids", "with a position for each"),
    (open_rows, "logit_indices", "['n'], but every dimension is static"),
    (undeclared_rows, "logit_indices", "['?'], but every dimension is static"),
    (computed_shape, "layer.0.rows", "but every dimension is static"),
    (longer_past, "past_key.1", "[1, 2, 80, 16]"),
    (float32_past, "past_key.0", "is of float"),
    (unpadded_head, "head.scores.product", "401 rows, no multiple of 64"),
    (float32_norm, "norm", "'norm.weight' in float"),
    (half_logits, "logits", "of float16"),
    (padded_logits, "logits", "448 columns"),
]
SCATTER: list[tuple[Mutation, str, str]] = [
    (shorter_present, "present_key.1", "[1, 2, 64, 16], but past and present"),
    (missing_present, "present_value.1", "not declared"),
    (crossed_layers, "present_key.0", "writes 'past_key.1' to 'present_key.0'"),
    (written_elsewhere, "present_key.0", "at 'logit_indices'"),
    (read_before, "layer.1.attention.heads", "reads 'past_key.1' before it is written"),
    (never_written, "past_value.1", "is never written"),
    (other_axis, "present_key.0", "along axis 2, but TensorRT's parser"),
    (causal, "layer.0.attention.heads", "is causal beside its mask"),
    (past_of_attention, "layer.0.attention.heads", "has the inputs"),
    (second_output, "layer.0.attention.heads", "has the outputs"),
]
PRIMITIVE: list[tuple[Mutation, str, str]] = [
    (longer_new, "new_value.1", "[1, 2, 72, 16], but past and present"),
    (missing_new, "new_value.1", "not declared"),
    (copied_past, "layer.0.attention.past_keys", "reads 'past_key.0' as Concat"),
    (unread_past, "past_value.1", "is read by nothing"),
    (axes_input, "norm.mean", "takes its axes as an input"),
]
CASES = [
    *((target, *case) for target in FORMATS for case in BOTH),
    *(("tensorrt", *case) for case in SCATTER),
    *(("tensorrt-primitive", *case) for case in PRIMITIVE),
]


@pytest.mark.parametrize(
    ("target", "mutate", "name", "words"), CASES, ids=[f"{target}-{mutate.__name__}" for target, mutate, *_ in CASES]
)
def test_a_graph_that_breaks_a_rule_is_rejected(
    target: str, mutate: Mutation, name: str, words: str, graphs: Graphs
) -> None:
    model = graphs.proto(target)
    mutate(model)
    with pytest.raises(ExportError, match=re.escape(words)) as caught:
        check_graph(model, FORMATS[target], graphs.dims)
    assert str(caught.value).startswith(f"{target} graph: {name!r} ")


def test_a_target_keeps_to_its_own_operators(graphs: Graphs) -> None:
    with pytest.raises(ExportError, match="is RMSNormalization, but only the target's operators"):
        check_graph(graphs.proto("tensorrt"), FORMATS["tensorrt-primitive"], graphs.dims)
    with pytest.raises(ExportError, match=r"is (ReduceMean|Where), but"):
        check_graph(graphs.proto("tensorrt-primitive"), FORMATS["tensorrt"], graphs.dims)
