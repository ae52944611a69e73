"""The teacher's predictions on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.distill import teacher as teacher_module
from export.distill.batches import make_batch
from export.distill.corpus import Corpus
from export.distill.student import StudentShape, new_student
from export.distill.teacher import CacheKey, TeacherCache
from export.errors import ExportError
from tests.export.distill.tiny_corpus import VOCAB, make_corpus

TOP_K = 5


@pytest.fixture
def teacher() -> Any:
    return new_student(StudentShape(1, 32), VOCAB, 24, 0.0, 5)


@pytest.fixture
def key(corpus: Corpus) -> CacheKey:
    return CacheKey("a teacher", corpus.digest, TOP_K, 2.0)


def cache_in(folder: Path, key: CacheKey, corpus: Corpus) -> TeacherCache:
    return TeacherCache(folder, key, int(corpus.token_ids.size))


def contents(cache: TeacherCache, corpus: Corpus) -> list[np.ndarray[Any, Any]]:
    return list(cache.read(make_batch(corpus, np.arange(len(corpus))).corpus_positions))


def few_batches_a_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_module, "_BATCH_TOKENS", 64)
    monkeypatch.setattr(teacher_module, "_BATCHES_A_SHARD", 2)


def test_the_key_changes_with_all_that_it_depends_on(key: CacheKey) -> None:
    others = [
        replace(key, teacher="another"),
        replace(key, corpus=make_corpus(seed=1).digest),
        replace(key, top_k=6),
        replace(key, temperature=1.0),
    ]
    assert len({key.digest, *(other.digest for other in others)}) == 5
    assert replace(key).digest == key.digest


def test_caches_of_several_keys_lie_side_by_side(key: CacheKey, corpus: Corpus, teacher: Any, tmp_path: Path) -> None:
    first, second = cache_in(tmp_path, key, corpus), cache_in(tmp_path, replace(key, temperature=1.0), corpus)
    first.fill(teacher, corpus)
    assert second.done_shards == 0
    second.fill(teacher, corpus)
    assert len(list(tmp_path.iterdir())) == 2
    assert not np.array_equal(contents(first, corpus)[1], contents(second, corpus)[1])


def test_a_filled_cache_is_what_the_teacher_says(key: CacheKey, corpus: Corpus, teacher: Any, tmp_path: Path) -> None:
    import torch

    cache = cache_in(tmp_path, key, corpus)
    cache.fill(teacher, corpus)
    batch = make_batch(corpus, np.arange(len(corpus)))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = teacher(torch.from_numpy(batch.input_ids)).logits.float()
    expected = torch.log_softmax(logits.reshape(-1, VOCAB)[torch.from_numpy(batch.predicting)] / 2.0, dim=-1).numpy()
    token_ids, log_probs, tails = contents(cache, corpus)
    assert token_ids.shape == log_probs.shape == (batch.predicting.size, TOP_K)
    np.testing.assert_allclose(log_probs, np.sort(expected, axis=-1)[:, ::-1][:, :TOP_K], atol=0.02)
    np.testing.assert_allclose(log_probs, np.take_along_axis(expected, token_ids, axis=-1), atol=0.02)
    np.testing.assert_allclose(np.exp(log_probs).sum(-1) + np.exp(tails), 1.0, atol=0.01)


def test_a_cache_of_every_token_has_no_rest(corpus: Corpus, teacher: Any, tmp_path: Path) -> None:
    cache = cache_in(tmp_path, CacheKey("a teacher", corpus.digest, VOCAB, 1.0), corpus)
    cache.fill(teacher, corpus)
    token_ids, log_probs, tails = contents(cache, corpus)
    assert (np.sort(token_ids, axis=-1) == np.arange(VOCAB)).all()
    assert (tails <= -99).all()
    np.testing.assert_allclose(np.exp(log_probs).sum(-1), 1.0, atol=0.01)


class PowerCutError(Exception):
    pass


class Counting:
    """A teacher that counts its batches, and fails after some."""

    def __init__(self, teacher: Any, fail_after: int = 10**9) -> None:
        self._teacher = teacher
        self.config, self.lm_head, self.eval = teacher.config, teacher.lm_head, teacher.eval
        self.batches = 0
        self._fail_after = fail_after

    def base_model(self, input_ids: Any) -> Any:
        if self.batches == self._fail_after:
            raise PowerCutError
        self.batches += 1
        return self._teacher.base_model(input_ids)


def test_an_interrupted_fill_goes_on(
    key: CacheKey, corpus: Corpus, teacher: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_batches_a_shard(monkeypatch)
    whole = Counting(teacher)
    cache_in(tmp_path / "whole", key, corpus).fill(whole, corpus)
    assert whole.batches > 10
    halting = Counting(teacher, fail_after=7)
    with pytest.raises(PowerCutError):
        cache_in(tmp_path / "cut", key, corpus).fill(halting, corpus)
    resumed = cache_in(tmp_path / "cut", key, corpus)
    assert resumed.done_shards == 3
    rest = Counting(teacher)
    resumed.fill(rest, corpus)
    assert rest.batches == whole.batches - 6
    for own, expected in zip(
        contents(resumed, corpus), contents(cache_in(tmp_path / "whole", key, corpus), corpus), strict=True
    ):
        np.testing.assert_array_equal(own, expected)


def test_a_full_cache_does_not_ask_the_teacher_again(
    key: CacheKey, corpus: Corpus, teacher: Any, tmp_path: Path
) -> None:
    cache_in(tmp_path, key, corpus).fill(teacher, corpus)
    again = Counting(teacher)
    cache_in(tmp_path, key, corpus).fill(again, corpus)
    assert again.batches == 0


@pytest.mark.parametrize("content", ["", "{", '{"steps": 3}'])
def test_a_damaged_note_of_progress_begins_anew(
    content: str, key: CacheKey, corpus: Corpus, teacher: Any, tmp_path: Path
) -> None:
    cache_in(tmp_path, key, corpus).fill(teacher, corpus)
    (note,) = tmp_path.glob("*/progress.json")
    note.write_text(content)
    again = Counting(teacher)
    cache_in(tmp_path, key, corpus).fill(again, corpus)
    assert again.batches > 0


def test_a_vocabulary_that_does_not_fit_into_16_bits_is_refused(
    key: CacheKey, corpus: Corpus, teacher: Any, tmp_path: Path
) -> None:
    teacher.config.vocab_size = (1 << 16) + 1
    with pytest.raises(ExportError, match="at most 65536 tokens"):
        cache_in(tmp_path, key, corpus).fill(teacher, corpus)
