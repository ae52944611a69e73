"""What is trained on: token sequences in one flat array, with the position where each one's answer begins."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final

import numpy as np

from export.console import progress
from export.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edge_llm.engine.tokenizer import Tokenizer
    from export.packs.encode import EncodedExample

_MIN_TEXT_TOKENS: Final = 8


@dataclass(frozen=True)
class Corpus:
    """Sequences of token ids.

    Attributes:
        token_ids: ``(tokens,)`` int32, one sequence after another.
        offsets: ``(sequences + 1,)`` int64, where each begins.
        answer_starts: ``(sequences,)`` int32; the tokens before belong to the prompt. 0 for plain text.
    """

    token_ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    answer_starts: NDArray[np.int32]

    def __len__(self) -> int:
        return int(self.answer_starts.size)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sequence."""
        return np.diff(self.offsets)

    @property
    def digest(self) -> str:
        """SHA-256 of everything in it: another corpus has another one."""
        digest = hashlib.sha256()
        for array in (self.token_ids, self.offsets, self.answer_starts):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def sequence(self, index: int) -> NDArray[np.int32]:
        """The token ids of one sequence."""
        return self.token_ids[self.offsets[index] : self.offsets[index + 1]]

    def save(self, path: Path) -> None:
        """Write all of it or nothing."""
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, token_ids=self.token_ids, offsets=self.offsets, answer_starts=self.answer_starts)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Corpus:
        """Read what ``save`` wrote."""
        with np.load(path) as arrays:
            return cls(arrays["token_ids"], arrays["offsets"], arrays["answer_starts"])

    @classmethod
    def from_sequences(cls, sequences: Iterable[EncodedExample]) -> Corpus:
        """Collect encoded examples. Raises ``ExportError`` if there are none."""
        every = list(sequences)
        if not every:
            raise ExportError("the corpus is empty")
        lengths = [len(sequence.token_ids) for sequence in every]
        token_ids = np.fromiter(itertools.chain.from_iterable(s.token_ids for s in every), np.int32, sum(lengths))
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return cls(token_ids, offsets, np.array([sequence.answer_start for sequence in every], np.int32))


def example_corpus(examples: Iterable[EncodedExample], count: int, max_tokens: int) -> Corpus:
    """The first ``count`` examples that have at most ``max_tokens`` tokens.

    Raises:
        ExportError: hardly any of them does.
    """
    sequences: list[EncodedExample] = []
    with progress("writing the corpus", count, unit="example") as bar:
        for tried, encoded in enumerate(examples, 1):
            if len(encoded.token_ids) <= max_tokens:
                sequences.append(encoded)
                bar.update()
            elif tried > 100 and len(sequences) < tried / 2:
                raise ExportError(f"most examples have more than {max_tokens} tokens: shorten them or raise --context")
            if len(sequences) == count:
                break
    return Corpus.from_sequences(sequences)


def text_corpus(text: str, tokenizer: Tokenizer, end_id: int, window_tokens: int) -> Corpus:
    """A plain text in windows of ``window_tokens``, each from the end-of-text token on.

    Raises:
        ExportError: the text is too short.
    """
    ids = tokenizer.encode(text)
    if len(ids) < _MIN_TEXT_TOKENS:
        raise ExportError("the corpus holds almost no text")
    step = window_tokens - 1
    windows = [[end_id, *ids[start : start + step]] for start in range(0, len(ids), step)]
    return _plain(window for window in windows if len(window) >= _MIN_TEXT_TOKENS)


def _plain(windows: Iterable[Sequence[int]]) -> Corpus:
    from export.packs.encode import EncodedExample

    return Corpus.from_sequences(EncodedExample(list(window), 0) for window in windows)
