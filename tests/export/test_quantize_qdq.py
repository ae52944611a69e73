"""Products in static int8: what is quantised, how well, and what is left out with its loss."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edge_llm.bundle.manifest import ModelDims
from edge_llm.engine.runner import Runner
from export.calibrate import measure_largest
from export.checkpoints import load_checkpoint
from export.errors import ExportError
from export.graph.check_qdq import unquantized
from export.graph.weights import CPU_FP32, tensorrt_int8
from export.graphs import build_graph, estimated_bytes
from export.quantize_qdq import quantize_products
from export.verify import compare, open_judged
from export.verify_static import static_paths
from tests.export.models import gpt2_config, llama_config, random_ids, random_model, save

CONTEXT = 96
WEIGHTS = tensorrt_int8()
# Longer than a chunk, so that calibration has a past.
CALIBRATION = [random_ids(CONTEXT, seed=seed) for seed in (1, 2)]
PRODUCTS = [
    f"h.{layer}.{name}.product"
    for layer in range(2)
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
]


class Model:
    """A checkpoint with its reference and its float16 graphs, not quantised yet."""

    def __init__(self, model: Any, folder: Path) -> None:
        self.checkpoint = load_checkpoint(str(save(model, folder / "model")))
        self.dims: ModelDims = self.checkpoint.architecture.dims(CONTEXT)
        self.reference = Runner(build_graph(self.checkpoint, CPU_FP32, self.dims, folder / "cpu-fp32"), self.dims)
        self.path = build_graph(self.checkpoint, WEIGHTS, self.dims, folder / WEIGHTS.target)

    def quantize(self, limit: float, windows: Sequence[Sequence[int]] = CALIBRATION) -> onnx.ModelProto:
        quantize_products(self.path, self.dims, WEIGHTS, windows, self.reference, limit)
        return onnx.load(str(self.path), load_external_data=False)


def with_outlier() -> Any:
    """A GPT-2 with one inner channel that is 2000 times larger than it was, and weights that make up for it."""
    model = random_model(gpt2_config(activation_function="relu"))
    mlp = model.transformer.h[1].mlp
    mlp.c_fc.weight.data[:, 7] *= 2000
    mlp.c_fc.bias.data[7] *= 2000
    mlp.c_proj.weight.data[7] /= 2000
    return model


def likely_ids(runner: Runner, first: int) -> list[int]:
    """What the model itself says, so that every change of it costs perplexity."""
    token_ids = [first]
    while len(token_ids) < CONTEXT:
        token_ids.append(int(runner.forward(0, token_ids[-1:], len(token_ids) - 1, [0])[0].argmax()))
    return token_ids


def constants(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


@pytest.mark.parametrize("config", [gpt2_config, llama_config])
def test_every_product_is_quantized(config: Callable[[], Any], tmp_path: Path) -> None:
    model = Model(random_model(config()), tmp_path)
    data_file = model.path.with_name("model.onnx.data")
    before = data_file.read_bytes()
    largest = measure_largest(static_paths(model.path).prefill, model.dims, CALIBRATION, "")
    quantized = model.quantize(1.05)
    producers = {node.output[0]: node for node in quantized.graph.node}
    products = [node for node in quantized.graph.node if node.op_type == "MatMul"]
    assert len(products) == 8
    assert unquantized(quantized) == {}
    for product in products:
        activation, weight = (producers[producers[name].input[0]] for name in product.input)
        scale = numpy_helper.to_array(constants(quantized)[activation.input[1]])
        assert scale == pytest.approx(largest[activation.input[0]] / 127, rel=2e-3)
        outputs = constants(quantized)[weight.input[0]].dims[-1]
        assert constants(quantized)[weight.input[1]].dims == [outputs]
    # No pair but theirs: outputs are not quantised.
    kinds = [node.op_type for node in quantized.graph.node]
    assert kinds.count("QuantizeLinear") == kinds.count("DequantizeLinear") == 16
    prefill = onnx.load(str(static_paths(model.path).prefill), load_external_data=False)
    assert prefill.graph.node == quantized.graph.node
    assert prefill.graph.initializer == quantized.graph.initializer
    assert data_file.read_bytes() == before
    assert {path.name for path in model.path.parent.iterdir()} == {"model.onnx", "prefill.onnx", "model.onnx.data"}
    assert estimated_bytes(model.checkpoint, WEIGHTS, model.dims) > 2 * len(before)
    runner = open_judged(model.path, model.dims, WEIGHTS)
    figures = compare(runner, model.reference, [random_ids(CONTEXT, seed=5)], "")
    assert figures.perplexity_ratio == pytest.approx(1, abs=0.02)
    assert 1e-5 < figures.mean_kl < 0.01


def test_what_loses_too_much_is_left_out_and_listed_with_its_loss(tmp_path: Path) -> None:
    model = Model(with_outlier(), tmp_path)
    windows = [likely_ids(model.reference, first) for first in (5, 6, 7, 8)]
    quantized = model.quantize(1.05, windows[:3])
    listed = unquantized(quantized)
    assert list(listed) == ["h.1.mlp.c_proj.product"]
    assert listed["h.1.mlp.c_proj.product"]["mean_kl"] > 0.02
    assert listed["h.1.mlp.c_proj.product"]["perplexity_ratio"] > 1.025
    by_name = {node.name: node for node in quantized.graph.node}
    assert list(by_name["h.1.mlp.c_proj.product"].input) == ["h.1.mlp.act", "h.1.mlp.c_proj.weight"]
    for name in PRODUCTS[:-1]:
        assert all(source.endswith("_DequantizeLinear_Output") for source in by_name[name].input)
    figures = compare(open_judged(model.path, model.dims, WEIGHTS), model.reference, windows[3:], "")
    assert figures.perplexity_ratio < 1.05


def test_a_model_of_which_nothing_fits_is_refused(tmp_path: Path) -> None:
    model = Model(random_model(gpt2_config()), tmp_path)
    with pytest.raises(ExportError, match=r"no product of this model can be in int8 within a perplexity ratio of 0\.5"):
        model.quantize(0.5)


def test_tiny_weights_do_not_become_zeros(tmp_path: Path) -> None:
    source = random_model(gpt2_config())
    projection = source.transformer.h[0].attn.c_proj.weight
    projection.data[:, 3] *= 1e-3
    projection.data[:, 4] = 0
    model = Model(source, tmp_path)
    quantized = model.quantize(1.05)
    scales = numpy_helper.to_array(constants(quantized)["h.0.attn.c_proj.weight_scale"])
    assert scales[3] == np.finfo(np.float16).tiny
    assert scales[4] == 1
    others = np.delete(scales, [3, 4])
    assert (others > scales[3]).all()
    assert (others < 0.01).all()


def test_optimum_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(random_model(gpt2_config()), tmp_path)
    monkeypatch.setitem(sys.modules, "optimum.onnxruntime", None)
    with pytest.raises(ExportError, match=r"needs optimum .*pip install 'edge-llm\[export\]'"):
        model.quantize(1.05)
