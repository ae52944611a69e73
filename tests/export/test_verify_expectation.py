"""The self-test that a device will give each target, taken at export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_llm.bundle.manifest import Bundle, Expectation, Manifest
from edge_llm.config import Config, EngineConfig
from edge_llm.engine.loading import load_model
from export import pipeline
from export.errors import ExportError
from export.verify_expectation import settle_expectations

Command = Callable[..., tuple[int, Path]]
TARGETS = ("cpu-int8", "cuda", "tensorrt", "tensorrt-primitive", "tensorrt-int8")
# Random weights leave predictions so flat that the ratio of a short text wanders by more than the defaults allow.
LOOSE = tuple(f"--max-{kind}-perplexity-ratio=1.2" for kind in ("cuda", "tensorrt", "tensorrt-int8"))


def damage(data_path: Path) -> None:
    """Shift every weight to another place."""
    weights = np.frombuffer(data_path.read_bytes(), np.uint16)
    data_path.write_bytes(np.roll(weights, len(weights) // 2 + 7).tobytes())


def differences(out: Path) -> dict[str, float]:
    report = json.loads((out / "quality.json").read_text())
    return {entry["target"]: entry["max_logit_difference"] for entry in report["graphs"]}


def expecting(manifest: Manifest, step: int) -> tuple[Expectation, Manifest]:
    """One in which a token is not what the graphs generate."""
    recorded = manifest.expectation.token_ids
    other = (recorded[step] + 1) % manifest.model.vocab_size
    wrong = Expectation(
        prompt_token_ids=manifest.expectation.prompt_token_ids,
        token_ids=(*recorded[:step], other, *recorded[step + 1 :]),
    )
    return wrong, msgspec.structs.replace(manifest, expectation=wrong)


def test_each_damaged_target_is_named(gpt2_folder: Path, export_command: Command) -> None:
    status, out = export_command(gpt2_folder, "--target", ",".join(TARGETS), "--context", "64", *LOOSE)
    assert status == 0
    manifest = Bundle.open(out).manifest
    assert tuple(graph.target for graph in manifest.graphs) == TARGETS
    assert settle_expectations(out, manifest, differences(out)) == manifest
    for target in TARGETS[1:]:
        data_path = out / f"graphs/{target}/model.onnx.data"
        whole = data_path.read_bytes()
        damage(data_path)
        with pytest.raises(ExportError, match=rf"^{target} disagrees with the self-test recorded from cpu-int8: "):
            settle_expectations(out, manifest, differences(out))
        data_path.write_bytes(whole)


def test_a_target_damaged_after_it_was_judged_is_not_packaged(
    llama_folder: Path, export_command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = pipeline._self_test

    def record_and_damage(graph_path: Path, *arguments: object) -> object:
        damage(graph_path.parent.parent / "cuda/model.onnx.data")
        return record(graph_path, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "_self_test", record_and_damage)
    status, out = export_command(llama_folder, "--target", "cpu-int8,cuda", "--context", "64", *LOOSE)
    assert status == 2
    assert "export: cuda disagrees with the self-test recorded from cpu-int8" in capsys.readouterr().err
    assert not out.parent.exists()


def test_the_tokens_of_the_first_steps_are_looked_at(gpt2_folder: Path, export_command: Command) -> None:
    _, out = export_command(gpt2_folder, "--target", "cpu-int8,cpu-fp32", "--context", "64")
    manifest = Bundle.open(out).manifest
    for step in range(3):
        wrong, changed = expecting(manifest, step)
        with pytest.raises(ExportError, match=rf"^cpu-fp32 disagrees .* token {step}, {wrong.token_ids[step]}, is "):
            settle_expectations(out, changed, {})


def test_coarser_weights_get_an_expectation_of_their_own(
    gpt2_folder: Path, export_command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out = export_command(gpt2_folder, "--target", "cpu-int8,cpu-fp32", "--context", "64")
    manifest = Bundle.open(out).manifest
    wrong, changed = expecting(manifest, 1)
    settled = settle_expectations(out, changed, {"cpu-int8": 50.0})
    assert "cpu-fp32 rightly generates other tokens than cpu-int8" in capsys.readouterr().err
    first, second = settled.graphs
    assert first.expectation is None
    assert second.expectation is not None
    assert second.expectation.token_ids[:3] == manifest.expectation.token_ids[:3] != wrong.token_ids[:3]
    # A device holds each graph to what was recorded for it.
    bundle = Bundle(out, settled, "digest")
    engine = EngineConfig(target="cpu-fp32", threads=1, slots=1, prepare=False)
    assert load_model(bundle, Config(cache_dir=str(tmp_path), engine=engine)).provider.target == "cpu-fp32"
