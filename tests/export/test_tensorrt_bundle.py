"""Bundles with the static graphs for TensorRT, through the command, and served on the CPU provider."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_llm.bundle.manifest import Bundle, decode_manifest, encode_manifest
from edge_llm.config import Config, EngineConfig
from edge_llm.engine.loading import load_model, memory_needs
from edge_llm.engine.static_runner import StaticRunner
from edge_llm.errors import ManifestError

Command = Callable[..., tuple[int, Path]]
TARGETS = ("tensorrt", "tensorrt-primitive")
# Random weights leave predictions so flat that the ratio of a short text wanders by more than the default allows.
LOOSE = ("--max-tensorrt-perplexity-ratio", "1.02")


def quality(out: Path, target: str) -> dict[str, Any]:
    report = json.loads((out / "quality.json").read_text())
    found: dict[str, Any] = next(graph for graph in report["graphs"] if graph["target"] == target)
    return found


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_bundle_with_both(
    family: str, request: pytest.FixtureRequest, export_command: Command, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(f"{family}_folder")
    flags = ("--target", ",".join(("cpu-int8", *TARGETS)), "--context", "80", "--ship-prefix", *LOOSE)
    status, out = export_command(folder, *flags)
    assert status == 0
    bundle = Bundle.open(out)
    bundle.verify()
    assert not list(out.rglob("every_row.onnx"))
    for target, opset in zip(TARGETS, (24, 17), strict=True):
        graph = bundle.manifest.graph(target)
        assert (graph.kv_dtype, graph.opset, graph.bits, graph.block_size) == ("float16", opset, 16, 0)
        assert (graph.prefill_file, graph.prefill_chunk) == (f"graphs/{target}/prefill.onnx", 64)
        assert (out / graph.file).stat().st_size < 100_000
        figures = quality(out, target)
        assert figures["max_perplexity_ratio"] == 1.02
        assert 0.99 < figures["perplexity_ratio"] < 1.01
        assert figures["top1_agreement"] > 0.97
        assert 0 < figures["max_abs_activation"] < 1000
        assert figures["hardware"].startswith("not run on hardware")
        assert figures["greedy"]["compared_with"] == "cpu-fp32"
        assert figures["greedy"]["equal"] + figures["greedy"]["near_ties"] == figures["greedy"]["tokens"] == 40
        config = Config(cache_dir=str(tmp_path / target), engine=EngineConfig(target=target, threads=1, slots=2))
        model = load_model(bundle, config)
        assert isinstance(model.engine.runner, StaticRunner)
        assert not model.prepared
        expectation = bundle.manifest.expectation
        answer = list(model.engine.generate(expectation.prompt_token_ids, max_tokens=len(expectation.token_ids)))
        assert answer[0] == expectation.token_ids[0]
    graph = bundle.manifest.graph("cpu-int8")
    assert (graph.form, graph.prefill_file, graph.prefill_chunk) == ("gqa", None, None)
    raw = msgspec.json.decode((out / "manifest.json").read_bytes())["graphs"][0]
    assert not {"form", "prefill_file", "prefill_chunk"} & set(raw)


def test_it_can_be_the_only_one(gpt2_folder: Path, export_command: Command) -> None:
    status, out = export_command(gpt2_folder, "--target", "tensorrt", "--context", "64", *LOOSE)
    assert status == 0
    bundle = Bundle.open(out)
    assert [graph.target for graph in bundle.manifest.graphs] == ["tensorrt"]
    needs = memory_needs(bundle, Config(), bundle.manifest.graphs[0])
    assert needs["weights"] == 2 * (out / "graphs/tensorrt/model.onnx.data").stat().st_size


def test_it_has_a_limit_of_its_own(
    gpt2_folder: Path, export_command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--target", "tensorrt-primitive", "--context", "64", "--max-tensorrt-perplexity-ratio", "0.9")
    status, out = export_command(gpt2_folder, *flags)
    assert status == 2
    message = capsys.readouterr().err
    assert "tensorrt-primitive: perplexity ratio" in message
    assert "or accept it with --max-tensorrt-perplexity-ratio" in message
    assert not out.exists()


def test_a_graph_out_of_range_is_not_packaged(
    gpt2_folder: Path, export_command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("export.verify_float16.MAX_ACTIVATION", 2.0)
    status, out = export_command(gpt2_folder, "--target", "tensorrt-primitive", "--context", "64", *LOOSE)
    assert status == 2
    assert "export: tensorrt-primitive: the tensor '" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("change", [{"prefill_chunk": None}, {"prefill_file": None}, {"form": "gqa"}])
def test_a_manifest_whose_static_graph_lacks_a_part_is_refused(
    change: dict[str, Any], gpt2_folder: Path, export_command: Command
) -> None:
    _, out = export_command(gpt2_folder, "--target", "tensorrt", "--context", "64", *LOOSE)
    manifest = decode_manifest((out / "manifest.json").read_bytes())
    broken = msgspec.structs.replace(manifest, graphs=(msgspec.structs.replace(manifest.graphs[0], **change),))
    with pytest.raises(ManifestError, match="the tensorrt graph of form"):
        decode_manifest(encode_manifest(broken))
