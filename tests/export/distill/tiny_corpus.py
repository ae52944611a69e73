"""A corpus that a model of a few thousand weights can learn something of."""

from __future__ import annotations

import numpy as np

from export.distill.corpus import Corpus
from export.packs.encode import EncodedExample

VOCAB = 24


def make_corpus(count: int = 60, seed: int = 0) -> Corpus:
    """Prompts of random tokens; the answer is the prompt once more."""
    rng = np.random.default_rng(seed)
    sequences = []
    for _ in range(count):
        words = [int(token_id) for token_id in rng.integers(2, VOCAB, rng.integers(2, 9))]
        sequences.append(EncodedExample([0, *words, 1, *words, 0], len(words) + 2))
    return Corpus.from_sequences(sequences)
