"""Which sequences each step trains on: a function of seed and step, so that a resumed run goes on as it would have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from export.distill.corpus import Corpus

# Sequences of like length share a batch; sorted within so many batches at a time, so that batches stay mixed.
_BATCHES_SORTED_TOGETHER: Final = 64


class Batch(NamedTuple):
    """One step's input.

    Attributes:
        input_ids: ``(rows, seq)`` int64, zeros after each sequence's end.
        predicting: ``(positions,)`` int64, indices into the flattened ``input_ids`` whose next token is learnt.
        targets: ``(positions,)`` int64, those next tokens.
        is_answer: ``(positions,)`` bool, whether the target belongs to an answer.
        corpus_positions: ``(positions,)`` int64, where the predicting tokens stand in the corpus.
    """

    input_ids: NDArray[np.int64]
    predicting: NDArray[np.int64]
    targets: NDArray[np.int64]
    is_answer: NDArray[np.bool_]
    corpus_positions: NDArray[np.int64]


class BatchOrder:
    """Batches of about ``batch_tokens`` tokens, padding included, epoch after epoch.

    Args:
        corpus: what is trained on.
        batch_tokens: the bound; a longer sequence is a batch alone.
        seed: of the order.
    """

    def __init__(self, corpus: Corpus, batch_tokens: int, seed: int) -> None:
        self._lengths = corpus.lengths
        self._batch_tokens = batch_tokens
        self._seed = seed
        self._epochs: list[int] = []  # the step at which each epoch ends
        self._current: tuple[int, list[NDArray[np.int64]]] = (-1, [])

    def indices(self, step: int) -> NDArray[np.int64]:
        """The sequences of a step."""
        epoch = 0
        while True:
            if epoch == len(self._epochs):
                before = self._epochs[-1] if self._epochs else 0
                self._epochs.append(before + len(self._batches(epoch)))
            if step < self._epochs[epoch]:
                start = self._epochs[epoch - 1] if epoch else 0
                return self._batches(epoch)[step - start]
            epoch += 1

    def _batches(self, epoch: int) -> list[NDArray[np.int64]]:
        if self._current[0] != epoch:
            self._current = (epoch, self._split(np.random.default_rng([self._seed, epoch])))
        return self._current[1]

    def _split(self, rng: np.random.Generator) -> list[NDArray[np.int64]]:
        order = rng.permutation(self._lengths.size)
        mean_length = max(1.0, float(self._lengths.mean()))
        rows = max(1, int(self._batch_tokens / mean_length)) * _BATCHES_SORTED_TOGETHER
        batches = []
        for start in range(0, order.size, rows):
            block = order[start : start + rows]
            block = block[np.argsort(self._lengths[block], kind="stable")]
            batches += cut_into_batches(block, self._lengths, self._batch_tokens)
        return [batches[index] for index in rng.permutation(len(batches))]


def cut_into_batches(
    block: NDArray[np.int64], lengths: NDArray[np.int64], batch_tokens: int
) -> list[NDArray[np.int64]]:
    """Cut indices of sequences, sorted by length, into batches whose padded size stays within the bound."""
    batches, start = [], 0
    for end in range(1, block.size + 1):
        is_last = end == block.size
        if is_last or int(lengths[block[end]]) * (end + 1 - start) > batch_tokens:
            batches.append(block[start:end])
            start = end
    return batches


def make_batch(corpus: Corpus, indices: NDArray[np.int64]) -> Batch:
    """Pad sequences to the longest of them."""
    lengths = corpus.lengths[indices]
    width = int(lengths.max())
    input_ids = np.zeros((indices.size, width), np.int64)
    parts: list[tuple[Any, ...]] = []
    for row, index in enumerate(indices):
        sequence = corpus.sequence(int(index))
        input_ids[row, : sequence.size] = sequence
        positions = np.arange(sequence.size - 1)
        parts.append(
            (
                row * width + positions,
                sequence[1:],
                positions + 1 >= corpus.answer_starts[index],
                corpus.offsets[index] + positions,
            )
        )
    predicting, targets, is_answer, corpus_positions = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Batch(input_ids, predicting, targets.astype(np.int64), is_answer, corpus_positions)
