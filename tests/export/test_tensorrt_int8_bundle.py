"""Bundles with int8 products for TensorRT, through the command, and served on the CPU provider."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_llm.bundle.manifest import Bundle
from edge_llm.config import Config, EngineConfig
from edge_llm.engine.loading import load_model
from edge_llm.engine.static_runner import StaticRunner

Command = Callable[..., tuple[int, Path]]
LIMIT = "--max-tensorrt-int8-perplexity-ratio"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_bundle_with_it(family: str, request: pytest.FixtureRequest, export_command: Command, tmp_path: Path) -> None:
    folder = request.getfixturevalue(f"{family}_folder")
    flags = ("--target", "tensorrt-int8,cpu-int8", "--context", "80", "--ship-prefix", LIMIT, "1.1")
    status, out = export_command(folder, *flags)
    assert status == 0
    bundle = Bundle.open(out)
    bundle.verify()
    graph = bundle.manifest.graph("tensorrt-int8")
    assert (graph.kv_dtype, graph.opset, graph.bits, graph.block_size, graph.form) == ("float16", 24, 8, 0, "scatter")
    report = json.loads((out / "quality.json").read_text())
    figures: dict[str, Any] = next(entry for entry in report["graphs"] if entry["target"] == "tensorrt-int8")
    assert figures["max_perplexity_ratio"] == 1.1
    assert 0.95 < figures["perplexity_ratio"] < 1.05
    assert figures["unquantized"] == {}
    assert figures["hardware"].startswith("not run on hardware")
    greedy = figures["greedy"]
    assert greedy["compared_with"] == "cpu-fp32"
    assert greedy["equal"] + greedy["near_ties"] <= greedy["tokens"] == 40
    config = Config(cache_dir=str(tmp_path / "cache"), engine=EngineConfig(target="tensorrt-int8", threads=1, slots=2))
    model = load_model(bundle, config)
    assert isinstance(model.engine.runner, StaticRunner)
    expectation = bundle.manifest.expectation
    answer = list(model.engine.generate(expectation.prompt_token_ids, max_tokens=len(expectation.token_ids)))
    assert tuple(answer) == expectation.token_ids


def test_it_has_a_limit_of_its_own(
    gpt2_folder: Path, export_command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out = export_command(gpt2_folder, "--target", "tensorrt-int8", "--context", "64", LIMIT, "0.5")
    assert status == 2
    message = capsys.readouterr().err
    assert "tensorrt-int8: no product of this model can be in int8" in message
    assert f"raise {LIMIT}" in message
    assert not out.exists()
