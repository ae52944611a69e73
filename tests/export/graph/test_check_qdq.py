"""Every rule for int8 products passes what is built, and rejects the graph that breaks just it, by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edge_llm.engine.runner import Runner
from export.checkpoints import load_checkpoint
from export.errors import ExportError
from export.graph.check import check_graph
from export.graph.check_qdq import UNQUANTIZED_KEY
from export.graph.weights import CPU_FP32, tensorrt, tensorrt_int8
from export.graphs import build_graph
from export.quantize_qdq import quantize_products
from tests.export.graph.test_check import add_sin, attribute, node, tensor
from tests.export.graph.test_check_static import computed_shape, open_batch, written_elsewhere
from tests.export.models import llama_config, random_ids, random_model, save

PRODUCT = "layers.0.self_attn.qkv_proj"
WEIGHT = f"{PRODUCT}.weight"
ACTIVATION = "layers.0.input_layernorm"


class Graphs:
    def __init__(self, folder: Path) -> None:
        checkpoint = load_checkpoint(str(save(random_model(llama_config()), folder / "model")))
        self.dims = checkpoint.architecture.dims(72)
        reference = Runner(build_graph(checkpoint, CPU_FP32, self.dims, folder / "cpu-fp32"), self.dims)
        self.path = build_graph(checkpoint, tensorrt_int8(), self.dims, folder / "tensorrt-int8")
        quantize_products(self.path, self.dims, tensorrt_int8(), [random_ids(70)], reference, 2.0)

    def proto(self, file: str = "prefill.onnx") -> onnx.ModelProto:
        return onnx.load(str(self.path.with_name(file)), load_external_data=False)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    return Graphs(tmp_path_factory.mktemp("qdq"))


@pytest.mark.parametrize("file", ["model.onnx", "prefill.onnx"])
def test_what_is_built_passes(file: str, graphs: Graphs) -> None:
    check_graph(graphs.proto(file), tensorrt_int8(), graphs.dims)


def replaced(model: onnx.ModelProto, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    found = tensor(model, name)
    found.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(found)), name))


def plain_activation(model: onnx.ModelProto) -> None:
    node(model, PRODUCT).input[0] = ACTIVATION


def plain_weight(model: onnx.ModelProto) -> None:
    node(model, PRODUCT).input[1] = WEIGHT


def listed(model: onnx.ModelProto, name: str) -> None:
    model.metadata_props.add(key=UNQUANTIZED_KEY, value=json.dumps({name: {"mean_kl": 0.1, "perplexity_ratio": 1.1}}))


def listed_and_quantized(model: onnx.ModelProto) -> None:
    listed(model, PRODUCT)


def listed_and_half_quantized(model: onnx.ModelProto) -> None:
    plain_weight(model)
    listed(model, PRODUCT)


def listed_and_missing(model: onnx.ModelProto) -> None:
    listed(model, "layers.7.mlp.down_proj")


def listed_without_a_loss(model: onnx.ModelProto) -> None:
    node(model, PRODUCT).input[0] = ACTIVATION
    node(model, PRODUCT).input[1] = WEIGHT
    model.metadata_props.add(key=UNQUANTIZED_KEY, value=json.dumps({PRODUCT: {}}))


def listed_unreadably(model: onnx.ModelProto) -> None:
    model.metadata_props.add(key=UNQUANTIZED_KEY, value="{")


def written_as_gemm(model: onnx.ModelProto) -> None:
    node(model, PRODUCT).op_type = "Gemm"


def quantized_twice_read(model: onnx.ModelProto) -> None:
    node(model, f"{WEIGHT}_DequantizeLinear").input[0] = node(model, f"{ACTIVATION}_QuantizeLinear").output[0]


def dequantized_constant(model: onnx.ModelProto) -> None:
    quantizer = node(model, f"{WEIGHT}_QuantizeLinear")
    node(model, f"{WEIGHT}_DequantizeLinear").input[0] = quantizer.input[0]
    model.graph.node.remove(quantizer)


def other_scale_back(model: onnx.ModelProto) -> None:
    other = node(model, "layers.1.input_layernorm_QuantizeLinear").input[1]
    node(model, f"{ACTIVATION}_DequantizeLinear").input[1] = other


def dequantized_norm(model: onnx.ModelProto) -> None:
    """A pair whose output another operator reads as well."""
    node(model, "layers.0.post_attention_layernorm.residual").input[1] = node(
        model, f"{ACTIVATION}_DequantizeLinear"
    ).output[0]


def no_zero_point(model: onnx.ModelProto) -> None:
    for kind in ("QuantizeLinear", "DequantizeLinear"):
        del node(model, f"{ACTIVATION}_{kind}").input[2:]


def external_zero_point(model: onnx.ModelProto) -> None:
    tensor(model, f"{WEIGHT}_zero_point").data_location = onnx.TensorProto.EXTERNAL


def unsigned_zero_point(model: onnx.ModelProto) -> None:
    replaced(model, f"{ACTIVATION}_zero_point", lambda zeros: zeros.astype(np.uint8))


def one_channel_off_zero(model: onnx.ModelProto) -> None:
    def shifted(zeros: np.ndarray) -> np.ndarray:
        return np.where(np.arange(len(zeros)) == 3, 1, zeros).astype(np.int8)

    replaced(model, f"{WEIGHT}_zero_point", shifted)


def computed_scale(model: onnx.ModelProto) -> None:
    for kind in ("QuantizeLinear", "DequantizeLinear"):
        node(model, f"{ACTIVATION}_{kind}").input[1] = "rotary.cos"


def float32_scale(model: onnx.ModelProto) -> None:
    replaced(model, f"{ACTIVATION}_scale", lambda scale: scale.astype(np.float32))


def one_scale_for_a_weight(model: onnx.ModelProto) -> None:
    replaced(model, f"{WEIGHT}_scale", lambda scales: scales.max())


def scales_for_an_activation(model: onnx.ModelProto) -> None:
    replaced(model, f"{ACTIVATION}_scale", lambda scale: np.full(64, scale))


def scales_of_inputs(model: onnx.ModelProto) -> None:
    for kind in ("QuantizeLinear", "DequantizeLinear"):
        attribute(model, f"{WEIGHT}_{kind}", "axis").i = 0


def no_scale(model: onnx.ModelProto) -> None:
    replaced(model, f"{ACTIVATION}_scale", np.zeros_like)


def infinite_scale(model: onnx.ModelProto) -> None:
    replaced(model, f"{WEIGHT}_scale", lambda scales: np.full_like(scales, np.inf))


def subnormal_scale(model: onnx.ModelProto) -> None:
    replaced(model, f"{WEIGHT}_scale", lambda scales: np.full_like(scales, 1e-6))


CASES: list[tuple[Callable[[onnx.ModelProto], None], str, str]] = [
    (plain_activation, PRODUCT, f"multiplies with '{ACTIVATION}' as it is, but every product is quantised, or listed"),
    (plain_weight, PRODUCT, f"multiplies with '{WEIGHT}' as it is"),
    (listed_and_quantized, PRODUCT, "is quantised though it is listed"),
    (listed_and_half_quantized, PRODUCT, "is quantised though it is listed"),
    (listed_and_missing, "layers.7.mlp.down_proj", "is listed and no product"),
    (listed_without_a_loss, PRODUCT, "is listed without what it would lose"),
    (listed_unreadably, UNQUANTIZED_KEY, "is metadata that cannot be read"),
    (written_as_gemm, PRODUCT, "is a product that cannot be quantised: make it a MatMul"),
    (quantized_twice_read, f"{ACTIVATION}_QuantizeLinear", "is not followed by just one DequantizeLinear, but a pair"),
    (dequantized_constant, f"{WEIGHT}_DequantizeLinear", "does not follow a QuantizeLinear"),
    (other_scale_back, f"{ACTIVATION}_DequantizeLinear", "undoes"),
    (dequantized_norm, f"{ACTIVATION}_DequantizeLinear", "does not feed just one product"),
    (
        no_zero_point,
        f"{ACTIVATION}_QuantizeLinear",
        "has no zero point in the graph, but TensorRT takes",
    ),
    (external_zero_point, f"{WEIGHT}_QuantizeLinear", "has no zero point in the graph"),
    (unsigned_zero_point, f"{ACTIVATION}_QuantizeLinear", "has a zero point in uint8"),
    (one_channel_off_zero, f"{WEIGHT}_QuantizeLinear", "has a zero point that is not 0"),
    (computed_scale, f"{ACTIVATION}_QuantizeLinear", "has no scale in the graph, but an activation has one scale"),
    (float32_scale, f"{ACTIVATION}_QuantizeLinear", "has a scale in float"),
    (one_scale_for_a_weight, f"{WEIGHT}_QuantizeLinear", "has 1 scales where 128 belong"),
    (scales_for_an_activation, f"{ACTIVATION}_QuantizeLinear", "has 64 scales where 1 belong"),
    (scales_of_inputs, f"{WEIGHT}_QuantizeLinear", "scales along axis 0"),
    (no_scale, f"{ACTIVATION}_QuantizeLinear", "has scales from 0 to 0"),
    (infinite_scale, f"{WEIGHT}_QuantizeLinear", "has scales from inf to inf"),
    (subnormal_scale, f"{WEIGHT}_QuantizeLinear", "has scales from"),
    # The rules of every static form hold as well.
    (add_sin, "wave", "is Sin, but only the target's operators"),
    (open_batch, "past_value.0", "['batch', 2, 72, 16]"),
    (computed_shape, "layer.0.rows", "but every dimension is static"),
    (written_elsewhere, "present_key.0", "at 'logit_indices'"),
]


@pytest.mark.parametrize(("mutate", "name", "words"), CASES, ids=[mutate.__name__ for mutate, *_ in CASES])
def test_a_graph_that_breaks_a_rule_is_rejected(
    mutate: Callable[[onnx.ModelProto], None], name: str, words: str, graphs: Graphs
) -> None:
    model = graphs.proto()
    mutate(model)
    with pytest.raises(ExportError, match=re.escape(words)) as caught:
        check_graph(model, tensorrt_int8(), graphs.dims)
    assert str(caught.value).startswith(f"tensorrt-int8 graph: {name!r} ")


def test_a_product_left_out_is_listed_and_then_passes(graphs: Graphs) -> None:
    model = graphs.proto()
    plain_activation(model)
    plain_weight(model)
    for name in (ACTIVATION, WEIGHT):
        for kind in ("QuantizeLinear", "DequantizeLinear"):
            model.graph.node.remove(node(model, f"{name}_{kind}"))
    with pytest.raises(ExportError, match="or listed with the loss"):
        check_graph(model, tensorrt_int8(), graphs.dims)
    listed(model, PRODUCT)
    check_graph(model, tensorrt_int8(), graphs.dims)


def test_only_the_int8_form_may_quantise(graphs: Graphs) -> None:
    with pytest.raises(ExportError, match=r"tensorrt graph: .* is QuantizeLinear, but only the target's operators"):
        check_graph(graphs.proto(), tensorrt(), graphs.dims)
