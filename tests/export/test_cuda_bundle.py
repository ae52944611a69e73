"""Bundles with a ``cuda`` graph, through the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_llm.bundle.manifest import Bundle
from edge_llm.engine.runner import Runner

Command = Callable[..., tuple[int, Path]]
# Random weights leave predictions so flat that the ratio of a short text wanders by more than the default allows.
LOOSE = ("--max-cuda-perplexity-ratio", "1.05")


def quality(out: Path, target: str) -> dict[str, Any]:
    report = json.loads((out / "quality.json").read_text())
    found: dict[str, Any] = next(graph for graph in report["graphs"] if graph["target"] == target)
    return found


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_cuda_beside_cpu_int8(family: str, request: pytest.FixtureRequest, export_command: Command) -> None:
    folder = request.getfixturevalue(f"{family}_folder")
    status, out = export_command(folder, "--target", "cpu-int8,cuda", "--context", "64", "--ship-prefix", *LOOSE)
    assert status == 0
    bundle = Bundle.open(out)
    bundle.verify()
    graph = bundle.manifest.graph("cuda")
    assert (graph.kv_dtype, graph.opset, graph.bits) == ("float16", 20, 8)
    assert bundle.manifest.graph("cpu-int8").kv_dtype == "float32"
    figures = quality(out, "cuda")
    assert figures["max_perplexity_ratio"] == 1.05
    assert 0.98 < figures["perplexity_ratio"] < 1.02
    assert figures["mean_kl"] < quality(out, "cpu-int8")["mean_kl"]
    assert 0 < figures["max_abs_activation"] < 1000
    assert "not been verified on hardware" in figures["float16"]
    greedy = figures["greedy"]
    assert greedy["compared_with"] == "cpu-int8"
    assert greedy["tokens"] == 32
    assert greedy["equal"] + greedy["near_ties"] == 32
    assert "max_abs_activation" not in quality(out, "cpu-int8")


def test_cuda_alone_is_compared_with_float32(gpt2_folder: Path, export_command: Command) -> None:
    status, out = export_command(gpt2_folder, "--target", "cuda", "--context", "64", *LOOSE)
    assert status == 0
    manifest = Bundle.open(out).manifest
    assert [graph.target for graph in manifest.graphs] == ["cuda"]
    assert quality(out, "cuda")["greedy"]["compared_with"] == "cpu-fp32"
    runner = Runner(out / manifest.graphs[0].file, manifest.model, kv_dtype=manifest.graphs[0].kv_dtype)
    assert runner.prefill(0, manifest.expectation.prompt_token_ids, 0) == manifest.expectation.token_ids[0]


def test_four_bits_are_no_reference(llama_folder: Path, export_command: Command) -> None:
    flags = ("--bits", "4", "--max-perplexity-ratio", "3")
    status, out = export_command(llama_folder, "--target", "cpu-int8,cuda", "--context", "64", *flags, *LOOSE)
    assert status == 0
    assert Bundle.open(out).manifest.graph("cuda").bits == 8
    assert quality(out, "cuda")["greedy"]["compared_with"] == "cpu-fp32"


def test_cuda_has_a_limit_of_its_own(
    gpt2_folder: Path, export_command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out = export_command(gpt2_folder, "--target", "cpu-int8,cuda", "--max-cuda-perplexity-ratio", "0.9")
    assert status == 2
    message = capsys.readouterr().err
    assert "cuda: perplexity ratio" in message
    assert "accept it with --max-cuda-perplexity-ratio" in message
    assert not out.exists()


def test_a_graph_out_of_range_is_not_packaged(
    gpt2_folder: Path, export_command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("export.verify_float16.MAX_ACTIVATION", 2.0)
    status, out = export_command(gpt2_folder, "--target", "cuda", *LOOSE)
    assert status == 2
    assert "export: cuda: the tensor '" in capsys.readouterr().err
    assert not out.exists()
