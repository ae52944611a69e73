"""The committed bundle is what its generator writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_llm.bundle.manifest import Bundle
from edge_llm.engine.runner import Runner
from edge_llm.engine.tokenizer import Tokenizer
from tests.generate_tiny_bundle import generate
from tests.paths import TINY_BUNDLE


def test_committed_bundle_is_whole_and_small() -> None:
    bundle = Bundle.open(TINY_BUNDLE)
    bundle.verify()
    assert sum(path.stat().st_size for path in TINY_BUNDLE.rglob("*") if path.is_file()) < 400_000


def test_generator_writes_the_committed_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    made, committed = generate(tmp_path / "bundle"), Bundle.open(TINY_BUNDLE).manifest
    for field in ("format", "name", "model", "graphs", "prompt", "generation", "created", "source"):
        assert getattr(made, field) == getattr(committed, field), field
    # Bytes of weights and tokenizer do not depend on the processor; graphs and figures may, on library versions.
    stable = ("tokenizer.json", "graphs/cpu-fp32/model.onnx.data")
    hashes = [{entry.path: entry.sha256 for entry in manifest.files} for manifest in (made, committed)]
    assert [hashes[0][path] for path in stable] == [hashes[1][path] for path in stable]


def test_answers_are_varied_and_hold_characters_of_several_bytes() -> None:
    manifest = Bundle.open(TINY_BUNDLE).manifest
    runner = Runner(TINY_BUNDLE / manifest.graphs[0].file, manifest.model)
    prompt = list(manifest.expectation.prompt_token_ids)
    answer = [runner.prefill(0, prompt, 0)]
    while len(answer) < 60:
        answer.append(int(runner.decode(0, answer[-1:], [len(prompt) + len(answer) - 1])[0]))
    assert tuple(answer[: len(manifest.expectation.token_ids)]) == manifest.expectation.token_ids
    assert len(set(answer)) > 20
    text = Tokenizer.from_file(TINY_BUNDLE / "tokenizer.json").decode(answer)
    assert any(ord(character) > 127 and character != "�" for character in text)
