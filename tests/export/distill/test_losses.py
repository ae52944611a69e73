"""What a student is punished for, and how it is judged."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from export.distill.batches import Batch, make_batch
from export.distill.corpus import Corpus
from export.distill.evaluate import bits_per_byte, exactness
from export.distill.losses import LossWeights, batch_loss
from export.distill.student import StudentShape, new_student
from export.distill.teacher import Predictions
from export.packs.encode import EncodedExample
from tests.export.distill.tiny_corpus import VOCAB


@pytest.fixture
def batch(corpus: Corpus) -> Batch:
    return make_batch(corpus, np.arange(6))


@pytest.fixture
def student() -> Any:
    return new_student(StudentShape(1, 32), VOCAB, 24, 0.0, 0).eval()


def log_probs(model: Any, batch: Batch, temperature: float) -> Any:
    """``(positions, vocab)`` of a model at a temperature."""
    import torch

    with torch.no_grad():
        logits = model(torch.from_numpy(batch.input_ids)).logits
    return torch.log_softmax(logits.reshape(-1, VOCAB)[torch.from_numpy(batch.predicting)] / temperature, dim=-1)


def predictions(distribution: Any, top_k: int) -> Predictions:
    """What the cache would hold of ``(positions, vocab)`` log-probabilities."""
    top, ids = distribution.topk(top_k, dim=-1)
    rest = distribution.scatter(-1, ids, float("-inf")).logsumexp(dim=-1).clamp(min=-100)
    return Predictions(ids.numpy(), top.clamp(min=-100).numpy(), rest.numpy())


@pytest.mark.parametrize("top_k", [1, 4, VOCAB - 1, VOCAB])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_no_divergence_from_the_same_distribution(student: Any, batch: Batch, top_k: int, temperature: float) -> None:
    same = predictions(log_probs(student, batch, temperature), top_k)
    weights = LossWeights(cross_entropy=0.0, divergence=1.0, temperature=temperature)
    loss, _ = batch_loss(student, batch, weights, same)
    assert loss.item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_over_the_whole_vocabulary_it_is_the_full_divergence(student: Any, batch: Batch, temperature: float) -> None:
    import torch

    teacher = log_probs(new_student(StudentShape(1, 32), VOCAB, 24, 0.0, 1).eval(), batch, temperature) * 3
    teacher = torch.log_softmax(teacher, dim=-1)
    weights = LossWeights(cross_entropy=0.0, divergence=1.0, temperature=temperature, prompt=1.0)
    loss, _ = batch_loss(student, batch, weights, predictions(teacher, VOCAB))
    own = log_probs(student, batch, temperature)
    full = torch.nn.functional.kl_div(own, teacher, reduction="batchmean", log_target=True) * temperature**2
    assert loss.item() == pytest.approx(float(full), rel=1e-4)
    assert loss.item() > 0.01


def test_a_bucket_for_the_rest_never_tells_more_than_all_tokens(student: Any, batch: Batch) -> None:
    import torch

    teacher = torch.log_softmax(log_probs(new_student(StudentShape(1, 32), VOCAB, 24, 0.0, 1), batch, 1.0) * 3, dim=-1)
    weights = LossWeights(cross_entropy=0.0, divergence=1.0, temperature=1.0)
    losses = [batch_loss(student, batch, weights, predictions(teacher, k))[0].item() for k in (1, 4, 12, VOCAB)]
    assert losses == sorted(losses)
    assert losses[0] > 0


def test_cross_entropy_counts_prompts_as_much_as_is_said(student: Any, batch: Batch) -> None:
    import torch

    each = -log_probs(student, batch, 1.0).gather(1, torch.from_numpy(batch.targets)[:, None])[:, 0]
    answers = torch.from_numpy(batch.is_answer)
    for prompt in (0.0, 0.25, 1.0):
        loss, of_answers = batch_loss(student, batch, LossWeights(prompt=prompt), None)
        expected = (each[answers].sum() + prompt * each[~answers].sum()) / (answers.sum() + prompt * (~answers).sum())
        assert loss.item() == pytest.approx(float(expected), rel=1e-5)
        assert of_answers == pytest.approx(float(each[answers].mean()), rel=1e-5)


def test_both_parts_add_up(student: Any, batch: Batch) -> None:
    teacher = predictions(log_probs(new_student(StudentShape(1, 32), VOCAB, 24, 0.0, 1), batch, 2.0), 4)
    parts = [LossWeights(0.5, 0.0), LossWeights(0.0, 0.25), LossWeights(0.5, 0.25)]
    first, second, both = (batch_loss(student, batch, weights, teacher)[0].item() for weights in parts)
    assert both == pytest.approx(first + second, rel=1e-5)


def test_gradients_reach_the_student(student: Any, batch: Batch) -> None:
    teacher = predictions(log_probs(student, batch, 2.0) * 2, 4)
    loss, _ = batch_loss(student, batch, LossWeights(0.5, 0.5), teacher)
    loss.backward()
    assert all(bool(p.grad is not None and p.grad.isfinite().all()) for p in student.parameters())


class Oracle:
    """A model that is sure of the next token of sequences that it knows, but for the ``wrong`` ones."""

    def __init__(self, corpus: Corpus, *wrong: tuple[int, int]) -> None:
        self._corpus = corpus
        self._wrong = wrong
        self._next = 0

    def eval(self) -> None:
        self._next = 0

    def __call__(self, input_ids: Any) -> Any:
        import torch

        logits = torch.zeros(*input_ids.shape, VOCAB)
        for row in range(input_ids.shape[0]):
            sequence = self._corpus.sequence(self._next)
            for place in range(sequence.size - 1):
                token_id = int(sequence[place + 1])
                is_wrong = (self._next, place + 1) in self._wrong
                logits[row, place, (token_id + 1) % VOCAB if is_wrong else token_id] = 9.0
            self._next += 1
        return SimpleNamespace(logits=logits)


SAY = 7


def test_an_answer_is_exact_if_every_token_is_the_most_likely() -> None:
    # A prompt of three tokens; kind, action, say; words and the end.
    one = EncodedExample([1, 2, 3, 4, 5, SAY, 6, 0], 3)
    corpus = Corpus.from_sequences([one, EncodedExample([1, 9, 3, 4, SAY, 6, SAY, 8, 0], 3), *[one] * 70])
    assert all(exactness(Oracle(corpus), corpus, SAY).answers)
    found = exactness(Oracle(corpus, (0, 1), (0, 2), (1, 7), (2, 3), (3, 5), (4, 6), (5, 7)), corpus, SAY)
    assert found.actions[:6] == [True, True, False, False, True, True]
    assert found.answers[:6] == [True, False, False, False, False, False]
    assert len(found.actions) == len(found.answers) == 72
    assert all(found.answers[6:])


@pytest.mark.parametrize("window", [5, 16, 100])
def test_bits_per_byte_of_a_model_that_knows_nothing(window: int) -> None:
    import torch

    class Uniform:
        def eval(self) -> None: ...

        def __call__(self, input_ids: Any) -> Any:
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, VOCAB))

    token_ids = [index % VOCAB for index in range(33)]
    assert bits_per_byte(Uniform(), token_ids, 64, window) == pytest.approx(32 * math.log2(VOCAB) / 64)
