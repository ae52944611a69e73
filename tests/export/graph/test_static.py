"""The static forms on the CPU provider: in float32 they are ``cpu-fp32`` over again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edge_llm.bundle.manifest import ModelDims
from edge_llm.engine.runner import Runner
from edge_llm.engine.static_runner import StaticRunner
from export.architectures.llama import LlamaConfig
from export.calibrate import measure_largest
from export.checkpoint import Checkpoint
from export.checkpoints import load_checkpoint
from export.graph.weights import CPU_FP32, WeightFormat, tensorrt, tensorrt_primitive
from export.graphs import build_graph, describe_graph, estimated_bytes
from export.verify import compare
from export.verify_float16 import compare_greedy
from export.verify_static import open_for_texts, static_paths
from tests.export.models import gpt2_config, llama_config, random_ids, random_model, save

CONTEXT = 176
STATIC = {"tensorrt": tensorrt, "tensorrt-primitive": tensorrt_primitive}
MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: gpt2_config(n_positions=CONTEXT),
    "gpt2-untied-exact": lambda: gpt2_config(
        n_positions=CONTEXT, n_head=5, n_embd=80, tie_word_embeddings=False, activation_function="gelu"
    ),
    "gpt2-quick-inverse": lambda: gpt2_config(
        n_positions=CONTEXT, activation_function="quick_gelu", scale_attn_by_inverse_layer_idx=True
    ),
    "gpt2-relu": lambda: gpt2_config(n_positions=CONTEXT, activation_function="relu"),
    "gpt2-silu": lambda: gpt2_config(n_positions=CONTEXT, activation_function="silu"),
    "llama": lambda: llama_config(max_position_embeddings=CONTEXT),
    "llama-untied-biases": lambda: llama_config(
        max_position_embeddings=CONTEXT, tie_word_embeddings=False, attention_bias=True, mlp_bias=True
    ),
    "llama-every-head-its-own": lambda: llama_config(max_position_embeddings=CONTEXT, num_key_value_heads=4),
    "llama-interleaved": lambda: llama_config(max_position_embeddings=CONTEXT),
}


class Model:
    """A checkpoint with its reference, and static graphs that are built when asked for."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.folder = folder
        self.checkpoint: Checkpoint = load_checkpoint(str(save(random_model(MODELS[kind]()), folder / "model")))
        if kind == "llama-interleaved":
            assert isinstance(self.checkpoint.architecture, LlamaConfig)
            turned = replace(self.checkpoint.architecture, rotary_interleaved=True)
            self.checkpoint = replace(self.checkpoint, architecture=turned)
        self.dims: ModelDims = self.checkpoint.architecture.dims(CONTEXT)
        self.reference = Runner(build_graph(self.checkpoint, CPU_FP32, self.dims, folder / "cpu-fp32"), self.dims)

    def path(self, weights: WeightFormat) -> Path:
        folder = self.folder / f"{weights.target}-{weights.float_type}"
        if not folder.exists():
            build_graph(self.checkpoint, weights, self.dims, folder)
        return folder / "model.onnx"

    def runner(self, weights: WeightFormat) -> StaticRunner:
        return StaticRunner(static_paths(self.path(weights)), self.dims, kv_dtype=weights.float_type)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    made: dict[str, Model] = {}

    def get(kind: str) -> Model:
        if kind not in made:
            made[kind] = Model(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return get


Get = Callable[[str], Model]


@pytest.mark.parametrize("target", STATIC)
@pytest.mark.parametrize("kind", MODELS)
def test_float32_is_the_reference_over_again(kind: str, target: str, models: Get) -> None:
    model, ids = models(kind), random_ids(130)
    runner = model.runner(STATIC[target]("float32"))
    expected = model.reference.forward(0, ids, 0, range(130))
    own = np.concatenate([runner.forward(0, ids[:70], 0, range(70)), runner.forward(0, ids[70:], 70, range(60))])
    np.testing.assert_allclose(own, expected, atol=2e-5 * float(expected.std()) + 1e-5)
    agreement = compare_greedy(runner, model.reference, target, [random_ids(60, seed=2)])
    assert agreement.tokens == 64
    assert agreement.equal + agreement.near_ties == 64
    assert agreement.near_ties == 0


@pytest.mark.parametrize("target", STATIC)
@pytest.mark.parametrize("kind", ["gpt2", "gpt2-untied-exact", "llama", "llama-interleaved"])
def test_float16_is_close(kind: str, target: str, models: Get) -> None:
    model, weights = models(kind), STATIC[target]()
    runner = open_for_texts(model.path(weights), model.dims, weights)
    figures = compare(runner, model.reference, [random_ids(150, seed=seed) for seed in (1, 2)], "")
    assert figures.perplexity_ratio == pytest.approx(1, abs=0.005)
    assert figures.max_logit_difference < 0.03
    assert figures.top1_agreement > 0.97
    agreement = compare_greedy(model.runner(weights), model.reference, target, [random_ids(60, seed=2)])
    assert agreement.equal >= 62


@pytest.mark.parametrize("target", STATIC)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_both_graphs_are_one_list_of_nodes_over_one_file(kind: str, target: str, models: Get) -> None:
    model, weights = models(kind), STATIC[target]()
    decode, prefill = (onnx.load(str(path), load_external_data=False) for path in static_paths(model.path(weights)))
    assert decode.graph.node == prefill.graph.node
    assert decode.graph.initializer == prefill.graph.initializer
    assert [entry.domain for entry in decode.opset_import] == [""]
    assert {path.name for path in model.path(weights).parent.iterdir()} == {
        "model.onnx",
        "prefill.onnx",
        "model.onnx.data",
    }
    locations = {
        entry.value for tensor in decode.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    assert locations == {"model.onnx.data"}
    large = [tensor for tensor in decode.graph.initializer if len(tensor.dims) == 2 and tensor.dims[0] >= 400]
    assert [list(tensor.dims) for tensor in large] == [[448, model.dims.hidden_size]]  # padded, and stored once


@pytest.mark.parametrize("target", STATIC)
def test_a_short_context_has_a_short_chunk(target: str, tmp_path: Path, models: Get) -> None:
    model, weights = models("gpt2"), STATIC[target]("float32")
    dims = model.checkpoint.architecture.dims(27)
    path = build_graph(model.checkpoint, weights, dims, tmp_path / "graph")
    runner = StaticRunner(static_paths(path), dims)
    assert runner.prefill_chunk == describe_graph(weights, dims).prefill_chunk == 24
    expected = model.reference.forward(0, random_ids(27), 0, [26])
    np.testing.assert_allclose(runner.forward(0, random_ids(27), 0, [26]), expected, atol=1e-4)


@pytest.mark.parametrize("target", STATIC)
def test_every_float16_tensor_is_measured(target: str, models: Get) -> None:
    model, weights = models("llama"), STATIC[target]()
    prefill = static_paths(model.path(weights)).prefill
    largest = measure_largest(prefill, model.dims, [random_ids(130), random_ids(5, seed=4)], "")
    cache = "present" if target == "tensorrt" else "new"
    assert {f"{cache}_key.0", f"{cache}_value.1", "layers.0.mlp.product", "head.scores", "norm"} < set(largest)
    assert all(0 < value < 1000 for value in largest.values())
    assert not prefill.with_name("observed.onnx").exists()


@pytest.mark.parametrize("target", STATIC)
@pytest.mark.parametrize("kind", ["gpt2", "gpt2-untied-exact", "llama"])
def test_the_estimate_covers_the_file(kind: str, target: str, models: Get) -> None:
    model, weights = models(kind), STATIC[target]()
    size = model.path(weights).with_name("model.onnx.data").stat().st_size
    pages = 4096 * len(onnx.load(str(model.path(weights)), load_external_data=False).graph.initializer)
    assert estimated_bytes(model.checkpoint, weights, model.dims) + pages > size
