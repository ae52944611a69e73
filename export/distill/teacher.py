"""The teacher's predictions, computed once and kept on disk: the most likely tokens of every position, and the rest.

A student learns from them epoch after epoch without the teacher. Each position holds the ``top_k`` log-probabilities at
the distillation temperature and the log of all other tokens' mass, so that the divergence is exact over the ``top_k``
tokens and one bucket for the rest.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from export.console import progress, say
from export.distill.batches import cut_into_batches, make_batch
from export.errors import ExportError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from export.distill.corpus import Corpus

_BATCH_TOKENS: Final = 4096
# Token ids are kept in 16 bits.
_MAX_VOCABULARY: Final = 1 << 16
# After so many batches the progress is written down, so that a stopped run goes on from there.
_BATCHES_A_SHARD: Final = 16


@dataclass(frozen=True)
class CacheKey:
    """What the cached predictions depend on."""

    teacher: str
    corpus: str
    top_k: int
    temperature: float

    @property
    def digest(self) -> str:
        """Names the cache's folder."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


class Predictions(NamedTuple):
    """The teacher's view of some positions, at the distillation temperature.

    Attributes:
        token_ids: ``(positions, top_k)`` int64.
        log_probs: ``(positions, top_k)`` float32.
        tail_log_probs: ``(positions,)`` float32, log of the mass of all other tokens.
    """

    token_ids: NDArray[np.int64]
    log_probs: NDArray[np.float32]
    tail_log_probs: NDArray[np.float32]


class TeacherCache:
    """Memory-mapped predictions for every position of a corpus.

    Args:
        folder: caches live below it, each in a folder named by its key.
        key: what it depends on.
        tokens: positions of the corpus.
    """

    def __init__(self, folder: Path, key: CacheKey, tokens: int) -> None:
        self.key = key
        self._folder = folder / f"teacher-{key.digest}"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._ids = self._map("token_ids", np.uint16, (tokens, key.top_k))
        self._log_probs = self._map("log_probs", np.float16, (tokens, key.top_k))
        self._tails = self._map("tail_log_probs", np.float16, (tokens,))

    def read(self, positions: NDArray[np.int64]) -> Predictions:
        """The predictions at positions of the corpus."""
        return Predictions(
            self._ids[positions].astype(np.int64),
            self._log_probs[positions].astype(np.float32),
            self._tails[positions].astype(np.float32),
        )

    @property
    def done_shards(self) -> int:
        """How much of it has been computed."""
        try:
            return int(json.loads((self._folder / "progress.json").read_text(encoding="utf-8"))["shards"])
        except (OSError, ValueError, KeyError):
            return 0

    def fill(self, teacher: Any, corpus: Corpus) -> None:
        """Compute what is missing.

        Args:
            teacher: a transformers model with the corpus' vocabulary.
            corpus: the one that ``key`` names.

        Raises:
            ExportError: the vocabulary is too large.
        """
        order = np.argsort(corpus.lengths, kind="stable")
        shards = _shards(corpus, order)
        done = self.done_shards
        if done >= len(shards):
            return
        say(f"asking the teacher about {corpus.token_ids.size} tokens")
        if teacher.config.vocab_size > _MAX_VOCABULARY:
            raise ExportError(
                f"a teacher's predictions are kept for at most {_MAX_VOCABULARY} tokens: trim --vocabulary"
            )
        teacher.eval()
        with progress("teacher", int(corpus.token_ids.size), unit="token") as bar:
            bar.update(sum(int(corpus.lengths[batch].sum()) for shard in shards[:done] for batch in shard))
            for number, shard in enumerate(shards[done:], done + 1):
                for batch in shard:
                    self._fill_batch(teacher, corpus, batch)
                    bar.update(int(corpus.lengths[batch].sum()))
                for array in (self._ids, self._log_probs, self._tails):
                    array.flush()
                self._write_progress(number)

    def _fill_batch(self, teacher: Any, corpus: Corpus, indices: NDArray[np.int64]) -> None:
        import torch

        batch = make_batch(corpus, indices)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = teacher.base_model(torch.from_numpy(batch.input_ids))[0]
            rows = hidden.reshape(-1, hidden.shape[-1])[torch.from_numpy(batch.predicting)]
            logits = teacher.lm_head(rows)
        log_probs = torch.log_softmax(logits.float() / self.key.temperature, dim=-1)
        top, ids = log_probs.topk(self.key.top_k, dim=-1)
        rest = log_probs.scatter(-1, ids, float("-inf")).logsumexp(dim=-1)
        where = batch.corpus_positions
        self._ids[where] = ids.numpy().astype(np.uint16)
        # float16 ends at -65504; less likely than e^-100 is never.
        self._log_probs[where] = top.clamp(min=-100).numpy().astype(np.float16)
        self._tails[where] = rest.clamp(min=-100).numpy().astype(np.float16)

    def _map(self, name: str, dtype: Any, shape: tuple[int, ...]) -> np.memmap[Any, Any]:
        path = self._folder / f"{name}.npy"
        if path.exists():
            return np.lib.format.open_memmap(path, mode="r+")
        return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)

    def _write_progress(self, shards: int) -> None:
        partial = self._folder / "progress.partial"
        partial.write_text(json.dumps({"shards": shards, **asdict(self.key)}), encoding="utf-8")
        partial.replace(self._folder / "progress.json")


def _shards(corpus: Corpus, order: NDArray[np.int64]) -> list[list[NDArray[np.int64]]]:
    batches = cut_into_batches(order, corpus.lengths, _BATCH_TOKENS)
    return [batches[start : start + _BATCHES_A_SHARD] for start in range(0, len(batches), _BATCHES_A_SHARD)]
