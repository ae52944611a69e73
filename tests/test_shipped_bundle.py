"""The bundle that comes along: intact, small enough, made for the pack beside it, and as good as it claims to be.

A sample of the held-out lines is asked here; ``python -m benchmarks.domain`` asks all of them.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.domain.judging import figures_of, judge_all
from benchmarks.domain.utterances import Utterance, pack_utterances
from edge_llm.bundle.manifest import Bundle
from edge_llm.bundle.shipped import shipped_bundle
from edge_llm.config import Config, EngineConfig
from edge_llm.domain.domain import read_schema
from edge_llm.engine.loading import LoadedModel, load_model
from export.packs.pack import load_pack

PACK = Path(__file__).parent.parent / "examples" / "vehicle"
QUESTIONS = {
    "What is artificial intelligence?": "ai",
    "How to implement a real-time question answering system?": "realtime_qa",
    "What is deep learning?": "deep_learning",
    "什么是人工智能？": "ai_zh",  # noqa: RUF001
    "如何实现实时问答系统？": "realtime_qa_zh",  # noqa: RUF001
    "什么是深度学习？": "deep_learning_zh",  # noqa: RUF001
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LoadedModel:
    config = Config(cache_dir=str(tmp_path_factory.mktemp("cache")), engine=EngineConfig(threads=1, slots=1))
    return load_model(Bundle.open(shipped_bundle()), config)


def test_its_files_are_those_of_its_manifest():
    bundle = Bundle.open(shipped_bundle())
    bundle.verify()
    listed = {entry.path for entry in bundle.manifest.files} | {"manifest.json"}
    there = {str(path.relative_to(bundle.path)) for path in bundle.path.rglob("*") if path.is_file()}
    assert there == listed
    assert sum(entry.size_bytes for entry in bundle.manifest.files) <= 40e6


def test_it_was_made_for_the_pack_beside_it():
    assert read_schema(Bundle.open(shipped_bundle())) == load_pack(PACK).schema


def test_it_says_what_it_is():
    folder = shipped_bundle()
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert all(heading in card for heading in ("## Data", "## Teacher", "## Recipe", "## Figures", "## Limits"))
    quality = json.loads((folder / "quality.json").read_text())
    assert [graph["perplexity_ratio"] <= 1.005 for graph in quality["graphs"]] == [True]


def test_a_sample_of_what_it_has_never_heard(model):
    assert model.domain is not None
    figures = figures_of(judge_all(model, model.domain, pack_utterances(PACK)[::8], "held-out sample"))
    # Just below what this sample gives on one machine (96 %, 96 %, 97 %, none); another rounds a little differently.
    assert figures.action_exact >= 0.94
    assert figures.answer_right >= 0.94
    assert figures.outside_refused >= 0.93
    assert figures.outside_executed <= 0.03


def test_the_questions_in_both_languages(model):
    answers = {reply.name: reply.answer for reply in load_pack(PACK).replies}
    wanted = [Utterance(text, "fact", answer_keywords=(answers[name],)) for text, name in QUESTIONS.items()]
    assert model.domain is not None
    assert figures_of(judge_all(model, model.domain, wanted, "questions")).failures == []
