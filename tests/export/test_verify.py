"""Texts in windows: what quantisation is fitted to and judged on."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_llm.engine.runner import Runner
from export.calibrate import measure_magnitudes
from export.checkpoints import load_checkpoint
from export.graph.weights import CPU_FP32, cpu_int8
from export.graphs import build_graph
from export.verify import compare, text_windows
from tests.export.models import random_ids

WINDOWS = [random_ids(40, seed=1), random_ids(2, seed=2), random_ids(17, seed=3)]


@given(length=st.integers(2, 3000), context=st.integers(16, 1024))
def test_windows_hold_the_whole_text_but_a_last_single_token(length: int, context: int) -> None:
    token_ids = list(range(length))
    windows = text_windows(token_ids, context)
    held = list(itertools.chain.from_iterable(windows))
    assert held == token_ids[: len(held)]
    assert len(held) >= length - 1
    assert all(2 <= len(window) <= min(512, context) for window in windows)


@pytest.fixture(scope="module")
def graphs(gpt2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The float32 and the int8 graph."""
    checkpoint = load_checkpoint(str(gpt2_folder))
    folder = tmp_path_factory.mktemp("graphs")
    dims = checkpoint.architecture.dims(64)
    reference = build_graph(checkpoint, CPU_FP32, dims, folder / "fp32")
    return reference, build_graph(checkpoint, cpu_int8(), dims, folder / "int8")


@pytest.fixture(scope="module")
def runners(gpt2_folder: Path, graphs: tuple[Path, Path]) -> tuple[Runner, Runner]:
    dims = load_checkpoint(str(gpt2_folder)).architecture.dims(64)
    return Runner(graphs[0], dims), Runner(graphs[1], dims)


def test_a_graph_agrees_with_itself(runners: tuple[Runner, Runner]) -> None:
    figures = compare(runners[0], runners[0], WINDOWS, "")
    assert figures.tokens == 39 + 1 + 16
    assert figures.perplexity_ratio == 1
    assert (figures.top1_agreement, figures.mean_kl, figures.max_logit_difference) == (1, 0, 0)


def test_each_window_begins_with_an_empty_cache(runners: tuple[Runner, Runner]) -> None:
    reference, graph = runners
    together = compare(graph, reference, WINDOWS, "")
    alone = [compare(graph, reference, [window], "") for window in WINDOWS]
    for name in ("perplexity", "reference_perplexity"):
        logs = [np.log(getattr(one, name)) * one.tokens for one in alone]
        assert np.log(getattr(together, name)) * together.tokens == pytest.approx(sum(logs), rel=1e-6)
    assert together.mean_kl > 0
    assert together.max_logit_difference == max(one.max_logit_difference for one in alone)


def test_magnitudes_are_those_of_all_windows(gpt2_folder: Path, graphs: tuple[Path, Path]) -> None:
    architecture = load_checkpoint(str(gpt2_folder)).architecture
    dims = architecture.dims(64)
    names = [group.activation for group in architecture.smoothing_groups()]
    together = measure_magnitudes(graphs[0], dims, names, WINDOWS)
    alone = [measure_magnitudes(graphs[0], dims, names, [window]) for window in WINDOWS]
    count = sum(map(len, WINDOWS))
    for name in names:
        squares = sum(np.square(one[name]) * len(window) for one, window in zip(alone, WINDOWS, strict=True))
        np.testing.assert_allclose(together[name], np.sqrt(squares / count), rtol=1e-4)
