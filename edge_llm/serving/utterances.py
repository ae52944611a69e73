"""Transcripts that are still growing: the latest partial of each utterance, until its query comes or it is stale."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_MAX_UTTERANCES: Final = 64
_MAX_PER_USER: Final = 4

Key = tuple[str, str]


@dataclass(eq=False)
class Utterance:
    """What one user has said so far. Times are ``time.monotonic()`` seconds.

    Attributes:
        name: the client's name for it.
        seq: of the latest partial.
        text: the whole transcript so far.
        unchanged: the latest partial said the same as the one before: the user has paused.
        updated_at: when the latest partial came.
        ended: its query has come.
        settled: the last word has stood for a while, so it counts as stable, too.
        target_ids: the prompt's tokens up to ``stable_text``, once they have been worked out.
        warmed: nothing is left to prefill for this text.
        judged: whether this text looks final has been decided.
        tries: how often an answer was begun ahead of the query.
    """

    user: str
    name: str
    session: str | None
    seq: int
    text: str
    updated_at: float
    unchanged: bool = False
    ended: bool = False
    settled: bool = False
    target_ids: list[int] | None = None
    warmed: bool = False
    judged: bool = False
    tries: int = 0

    def settle(self) -> None:
        """Nothing new has come for a while."""
        self.settled = True
        self.target_ids = None
        self.warmed = False

    @property
    def stable_text(self) -> str:
        """The transcript without its last word, which the recogniser may still change or go on with."""
        words = self.text.rstrip()
        if self.settled:
            return words
        cut = max((index for index, character in enumerate(words) if character.isspace()), default=0)
        return words[:cut].rstrip()


class Utterances:
    """Utterances by (user, name), bounded. Thread-safe: partials come from the network's thread.

    Args:
        warm_s: an utterance is forgotten so long after its last partial, or after its query.
    """

    def __init__(self, warm_s: float) -> None:
        self._warm_s = warm_s
        self._lock = threading.Lock()
        self._by_key: OrderedDict[Key, Utterance] = OrderedDict()

    def __len__(self) -> int:
        with self._lock:
            return len(self._by_key)

    def update(self, user: str, name: str, seq: int, text: str, session: str | None, now: float) -> bool:
        """Take a partial. False if it is stale: older than the last one, or its query has come already."""
        with self._lock:
            self._expire(now)
            key = (user, name)
            known = self._by_key.get(key)
            if known is not None and known.ended and (seq < known.seq or seq == 0):
                known = None  # counted from the start again: the name is used for the next utterance
            if known is not None and (known.ended or seq < known.seq):
                return False
            said = Utterance(user, name, session, seq, text, now)
            if known is not None:
                same = (known.text, known.session) == (text, session)
                said.unchanged = same and seq > known.seq  # not the same partial delivered twice
                said.tries = known.tries
                if same:
                    said.settled, said.target_ids, said.warmed = known.settled, known.target_ids, known.warmed
            self._by_key[key] = said
            self._by_key.move_to_end(key)
            self._bound(user)
            return True

    def end(self, user: str, name: str, now: float) -> None:
        """The query of an utterance has come: what is said of it from now on is too late."""
        with self._lock:
            said = self._by_key.get((user, name))
            if said is None:
                said = self._by_key[user, name] = Utterance(user, name, None, 0, "", now)
            said.ended = True
            said.updated_at = now
            self._by_key.move_to_end((user, name))
            self._bound(user)

    def count_try(self, said: Utterance) -> None:
        """An answer is begun ahead of the query of ``said``, which a newer partial may have replaced."""
        with self._lock:
            latest = self._by_key.get((said.user, said.name), said)
            latest.tries = said.tries = max(latest.tries, said.tries) + 1

    def forget(self, concerns: Callable[[str], bool]) -> None:
        """Forget what some users are saying."""
        with self._lock:
            for key in [key for key in self._by_key if concerns(key[0])]:
                del self._by_key[key]

    def growing(self, now: float) -> list[Utterance]:
        """Those whose query has not come, the latest first."""
        with self._lock:
            self._expire(now)
            return [said for said in reversed(self._by_key.values()) if not said.ended]

    def _expire(self, now: float) -> None:
        while self._by_key:
            key, oldest = next(iter(self._by_key.items()))
            if now - oldest.updated_at < self._warm_s:
                return
            del self._by_key[key]

    def _bound(self, user: str) -> None:
        own = [key for key in self._by_key if key[0] == user]
        if len(own) > _MAX_PER_USER:
            del self._by_key[own[0]]
        if len(self._by_key) > _MAX_UTTERANCES:
            self._by_key.popitem(last=False)
