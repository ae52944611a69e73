"""The same promise on a real graph, where a wrong order of sums would show: tests/data's bundle, every cache on."""

from __future__ import annotations

import platform
import random
from pathlib import Path

import pytest

from edge_llm.bundle.manifest import Bundle
from edge_llm.config import CacheConfig, Config, EngineConfig, PrefetchConfig
from edge_llm.engine.loading import load_model
from edge_llm.metrics import Metrics
from edge_llm.serving.caches import Caches, open_caches
from tests.serving.driver import Driver

BUNDLE = Path(__file__).parent.parent / "data" / "tiny_bundle"
WORDS = ["how", "far", "is", "it", "to", "the", "coast", "today", "and", "where", "can", "I", "charge"]


def model(folder: Path, target: str):
    config = Config(
        cache_dir=str(folder),
        engine=EngineConfig(threads=1, slots=3, prepare=False, target=target, prefill_chunk=16),
        cache=CacheConfig(max_bytes=1 << 20),
        prefetch=PrefetchConfig(max_tokens_per_s=1e9, warm_s=1e6, max_speculative_tokens=6),
    )
    return load_model(Bundle.open(BUNDLE), config), config


def open_warm(folder: Path, target: str) -> Driver:
    loaded, config = model(folder, target)
    metrics = Metrics()
    caches: Caches = open_caches(loaded, config, metrics)
    return Driver(model=loaded, caches=caches, metrics=metrics)


@pytest.mark.skipif(
    platform.machine() != "x86_64", reason="other processors' kernels are not known to sum in one order"
)
@pytest.mark.parametrize("target", ["cpu-int8", "cpu-fp32"])
def test_every_answer_is_the_cold_one_bit_for_bit(tmp_path, target):
    warm = open_warm(tmp_path / "warm", target)
    cold = Driver(model=model(tmp_path / "cold", target)[0])
    rng = random.Random(7)
    sources: set[str | None] = set()
    for turn in range(120):
        words = rng.choices(WORDS, k=rng.randint(2, 9))
        text, user = " ".join(words), rng.choice(["ann", "bob"])
        session = rng.choice([None, "s"])
        for end in sorted(rng.sample(range(1, len(words) + 1), k=rng.randint(0, len(words)))):
            warm.partial(" ".join(words[:end]), user, f"u{turn}", session=session)
            warm.idle(rng.randint(0, 6))
        if rng.random() < 0.2:
            warm.partial(text, user, f"u{turn}", session=session)
            warm.partial(text, user, f"u{turn}", session=session)
            warm.idle()
        tokens = rng.randint(1, 8)
        answer = warm.ask(
            text, user, session=session, max_tokens=tokens, utterance=f"u{turn}" if turn % 3 else None
        ).final
        expected = cold.ask(text, user, session=session, max_tokens=tokens).final
        assert answer.text == expected.text, (turn, answer, expected)
        sources |= {answer.source, answer.usage.cached_from}
        if turn == 60:
            warm.close()
            warm = open_warm(tmp_path / "warm", target)
            cold = Driver(model=model(tmp_path / "cold", target)[0])
    assert sources >= {"model", "prefetch", "slot", "tree", "partial"}
    assert warm.metrics.counter("prefetch_faults") == 0
    warm.close()
