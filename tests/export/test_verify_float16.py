"""Range and greedy answers of float16 graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_llm.bundle.manifest import ModelDims
from edge_llm.engine.runner import Runner
from export.calibrate import measure_largest
from export.checkpoint import Checkpoint
from export.checkpoints import load_checkpoint
from export.errors import ExportError
from export.graph.weights import cpu_int8, cuda
from export.graphs import build_graph
from export.tensors import MemoryTensors
from export.verify_float16 import check_activations, compare_greedy
from tests.export.models import random_ids

WINDOWS = [random_ids(40, seed=1), random_ids(2, seed=2), random_ids(17, seed=3)]
CONTEXT = 64


@pytest.fixture(scope="module")
def checkpoint(gpt2_folder: Path) -> Checkpoint:
    return load_checkpoint(str(gpt2_folder))


@pytest.fixture(scope="module")
def dims(checkpoint: Checkpoint) -> ModelDims:
    return checkpoint.architecture.dims(CONTEXT)


@pytest.fixture(scope="module")
def build(checkpoint: Checkpoint, dims: ModelDims, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``build(name=factor)``: the ``cuda`` graph with one weight scaled."""

    def made(**factors: float) -> Path:
        tensors = checkpoint.tensors
        arrays = {name: tensors.read(name) * np.float32(factors.get(name, 1)) for name in tensors.shapes}
        changed = replace(checkpoint, tensors=MemoryTensors(arrays))
        return build_graph(changed, cuda(), dims, tmp_path_factory.mktemp("graph") / "cuda")

    return made


def test_every_tensor_is_measured(build: Callable[..., Path], dims: ModelDims) -> None:
    largest = measure_largest(build(), dims, WINDOWS, "")
    assert {"wte", "embedding", "h.0.ln_1", "h.1.attn.c_attn.product", "h.1.mlp.act", "ln_f.residual"} < set(largest)
    assert {"present_key.0", "present_value.1", "head.scores"} < set(largest)
    assert not {"logits", "next_token_ids"} & set(largest)
    assert all(0 < value < 1000 for value in largest.values())


def test_a_text_in_chunks_reaches_as_far(
    build: Callable[..., Path], dims: ModelDims, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = build()
    whole = measure_largest(graph, dims, WINDOWS, "")
    monkeypatch.setattr("export.calibrate._CHUNK_TOKENS", 7)
    chunked = measure_largest(graph, dims, WINDOWS, "")
    assert list(chunked) == list(whole)
    for name, value in whole.items():
        assert chunked[name] == pytest.approx(value, rel=0.01), name


def test_the_report_names_the_largest(build: Callable[..., Path], dims: ModelDims) -> None:
    report = check_activations(build(), dims, "cuda", WINDOWS)
    assert report["max_abs_activation"] == next(iter(report["largest_tensors"].values()))
    assert "not been verified on hardware" in report["float16"]


@pytest.mark.parametrize(
    ("size", "words"),
    [(40_000, r"reaches [34]\d,\d{3}, more than the 30,000"), (400_000, "overflows float16")],
    ids=["too-large", "infinite"],
)
def test_the_first_tensor_out_of_range_is_named(
    size: float, words: str, build: Callable[..., Path], dims: ModelDims
) -> None:
    name = "h.0.mlp.c_proj"
    factor = size / measure_largest(build(), dims, WINDOWS, "")[f"{name}.product"]
    with pytest.raises(ExportError, match=f"cuda: the tensor '{name}.product' {words}"):
        check_activations(build(**{f"{name}.weight": factor}), dims, "cuda", WINDOWS)


def test_greedy_equals_cpu_int8(
    build: Callable[..., Path], checkpoint: Checkpoint, dims: ModelDims, tmp_path: Path
) -> None:
    int8 = Runner(build_graph(checkpoint, cpu_int8(), dims, tmp_path / "int8"), dims)
    agreement = compare_greedy(Runner(build(), dims, kv_dtype="float16"), int8, "cuda", WINDOWS)
    assert agreement.tokens == 32
    assert agreement.equal + agreement.near_ties == 32
    assert agreement.equal >= 30


def test_another_model_answers_otherwise(build: Callable[..., Path], dims: ModelDims) -> None:
    own, other = (Runner(build(**change), dims, kv_dtype="float16") for change in ({}, {"wpe.weight": -1.0}))
    with pytest.raises(ExportError, match=r"cuda: greedy token 0 is \d+, the reference graph says \d+"):
        compare_greedy(other, own, "cuda", WINDOWS)


class Scripted:
    """A runner whose logits after each position are given."""

    max_seq_len = 16

    def __init__(self, after: dict[int, dict[int, float]]) -> None:
        self.after = after
        self.fed: list[int] = []

    def forward(
        self, slot: int, token_ids: Sequence[int], past_len: int, logit_indices: Sequence[int]
    ) -> NDArray[np.float32]:
        self.fed += token_ids
        assert len(self.fed) == past_len + len(token_ids)
        logits = np.sin(np.arange(50, dtype=np.float32))
        for token_id, value in self.after.get(len(self.fed), {20: 5.0}).items():
            logits[token_id] = value
        return logits[None]


def test_a_near_tie_is_counted_and_both_go_on_with_the_reference() -> None:
    own, reference = Scripted({9: {3: 5.02, 4: 5.0}}), Scripted({9: {3: 5.0, 4: 5.05}})
    agreement = compare_greedy(cast("Runner", own), cast("Runner", reference), "cuda", [list(range(30))])
    assert agreement == (8, 7, 1)
    assert own.fed == reference.fed == [*range(8), 20, 4, *[20] * 5]


@pytest.mark.parametrize("side", [0, 1])
def test_a_tie_for_one_of_the_two_is_no_tie(side: int) -> None:
    scripts: list[Any] = [{9: {3: 5.02, 4: 5.0}}, {9: {3: 2.0, 4: 5.0}}]
    own, reference = (Scripted(script) for script in (scripts if side else scripts[::-1]))
    with pytest.raises(ExportError, match="greedy token 1 is"):
        compare_greedy(cast("Runner", own), cast("Runner", reference), "cuda", [list(range(30))])


def test_graphs_of_other_weights_may_differ() -> None:
    own, reference = Scripted({9: {3: 9.0}, 10: {3: 5.02, 4: 5.0}}), Scripted({10: {3: 5.0, 4: 5.05}})
    graphs = cast("Runner", own), cast("Runner", reference)
    assert compare_greedy(*graphs, "tensorrt-int8", [list(range(30))], strict=False) == (8, 6, 1)
