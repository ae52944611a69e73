"""Finds prompts that vary near their head: a clock or a name there makes every prefix cache miss.

A head is the part of a prompt that ought to stay the same, its system message. One that mostly equals an earlier one,
but for a small piece in its middle, is a finding.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from edge_llm.cache.state_db import ErasureWatch

if TYPE_CHECKING:
    import sqlite3

    from edge_llm.cache.state_db import StateDb

_log = logging.getLogger(__name__)

MIN_HEAD_TOKENS: Final = 16
# What lies behind the varying piece and could be reused; a template's closing tokens are not worth a word.
MIN_BEHIND_TOKENS: Final = 8
MAX_EXCERPT_CHARS: Final = 40
MAX_FINDINGS: Final = 256
# One change is somebody's edit, two are a habit.
MIN_COUNT: Final = 2
FORGET_S: Final = 7 * 86_400.0
_HEADS_KEPT: Final = 8
_MAX_HEAD_TOKENS: Final = 8192
_MAX_USERS: Final = 256
_MAX_HEAD_BYTES: Final = 4 << 20

_Head = NDArray[np.uint32]


@dataclass(frozen=True)
class Finding:
    """One user's prompts vary. ``position`` is the token where it begins; ``last_seen`` in seconds since 1970."""

    user: str
    position: int
    lost_tokens: int
    excerpt: str
    count: int
    last_seen: float

    def is_habit(self, now: float) -> bool:
        """Whether it has happened more than once, and lately."""
        return self.count >= MIN_COUNT and now - self.last_seen <= FORGET_S

    def __str__(self) -> str:
        what = f' ("{self.excerpt}")' if self.excerpt else ""
        return (
            f"the prompt varies from token {self.position} on{what}: {self.lost_tokens} tokens a query are prefilled "
            "again; put what varies behind what stays the same"
        )


@dataclass
class _User:
    heads: deque[_Head] = field(default_factory=lambda: deque(maxlen=_HEADS_KEPT))
    count: int = 0
    logged_at: float | None = None

    @property
    def nbytes(self) -> int:
        return sum(head.nbytes for head in self.heads)


def stored_findings(db: StateDb) -> list[Finding]:
    """What the file holds, the latest first."""
    rows = db.read(
        "SELECT user, position, lost_tokens, excerpt, count, last_seen FROM findings ORDER BY last_seen DESC, user"
    )
    # The file has no checksums: a row that was damaged is none.
    types = [str, int, int, str, int, float]
    return [Finding(*row) for row in rows or [] if [type(value) for value in row] == types]


def clear_findings(db: StateDb, user: str | None = None) -> int | None:
    """Erase the finding of one user, or all; waits for the disk. Returns how many, None if it failed."""
    return db.erase_rows("findings", user)


class PrefixLint:
    """Compares each user's heads with the few before. Thread-safe, bounded in users and bytes.

    Args:
        db: the state file; it holds the latest finding of each user.
        log_interval_s: at most one warning a user in this time.
        excerpts: whether a finding shows what varies, which may be a user's words.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        db: StateDb,
        *,
        log_interval_s: float = 3600.0,
        excerpts: bool = True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._db = db
        self._excerpts = excerpts
        self._log_interval_s = log_interval_s
        self._clock = clock
        self._lock = threading.Lock()
        self._users: OrderedDict[str, _User] = OrderedDict()
        self._nbytes = 0
        self._watch = ErasureWatch(db)

    def observe(self, user: str, head_ids: Sequence[int], tokenizer_decode: Callable[[Sequence[int]], str]) -> None:
        """Take note of one query's head.

        Args:
            user: whose query it is.
            head_ids: token ids of the rendered prompt's part that ought to be stable.
            tokenizer_decode: turns token ids into text; called only for a finding.
        """
        if not MIN_HEAD_TOKENS <= len(head_ids) <= _MAX_HEAD_TOKENS:
            return
        head: _Head = np.asarray(head_ids, dtype=np.uint32)
        with self._lock:
            state = self._remember(user, head)
            if state is None:
                return
            varying = _varying_piece(head, state.heads)
            self._keep(state, head)
            if varying is None:
                return
            state.count += 1
            habit = state.count >= MIN_COUNT
        now = self._clock()
        position, piece = varying
        excerpt = _excerpt(tokenizer_decode([int(token_id) for token_id in piece])) if self._excerpts else ""
        finding = Finding(user, position, len(head) - position, excerpt, 1, now)
        self._db.write(lambda connection: _store(connection, finding))
        with self._lock:
            last = state.logged_at
            due = habit and (last is None or not 0 <= now - last < self._log_interval_s)
            if due:
                state.logged_at = now
        if due:
            _log.warning("%s", finding, extra={"user": user})

    def findings(self) -> list[Finding]:
        """What was found lately, by any process, the latest first; also what happened once only."""
        return stored_findings(self._db)

    def forget_heads(self) -> None:
        """Drop what is in memory to compare with."""
        with self._lock:
            self._forget_all()

    def _forget_all(self) -> None:
        self._users.clear()
        self._nbytes = 0

    def _remember(self, user: str, head: _Head) -> _User | None:
        """The user's state, if ``head`` is new and there is something to compare it with."""
        if self._watch.erased():  # what varied may have been a name
            self._forget_all()
        state = self._users.setdefault(user, _User())
        self._users.move_to_end(user)
        if len(self._users) > _MAX_USERS:
            self._forget_oldest()
        if any(np.array_equal(head, earlier) for earlier in state.heads):
            return None
        if not state.heads:
            self._keep(state, head)
            return None
        return state

    def _keep(self, state: _User, head: _Head) -> None:
        self._nbytes -= state.nbytes
        state.heads.append(head)
        self._nbytes += state.nbytes
        while self._nbytes > _MAX_HEAD_BYTES:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        _, state = self._users.popitem(last=False)
        self._nbytes -= state.nbytes


def _varying_piece(head: _Head, earlier_heads: deque[_Head]) -> tuple[int, _Head] | None:
    """Where ``head`` leaves the earlier head that it shares the most with, and the tokens that differ there.

    None if it is the same text as none of them. Both parts that agree must cover half of the longer head, so neither
    another prompt nor one that goes on where the earlier ended is taken for a variant.
    """
    best: tuple[int, int, _Head] | None = None
    for earlier in earlier_heads:
        prefix = _common(head, earlier)
        rest = min(len(head), len(earlier)) - prefix
        suffix = min(rest, _common(head[::-1], earlier[::-1]))
        alike = 2 * (prefix + suffix) >= max(len(head), len(earlier)) and suffix >= MIN_BEHIND_TOKENS
        if alike and (best is None or prefix > best[0]):
            best = prefix, suffix, earlier
    if best is None:
        return None
    prefix, suffix, earlier = best
    piece = head[prefix : len(head) - suffix]
    # Where something was left out, the excerpt shows what.
    return prefix, piece if len(piece) else earlier[prefix : len(earlier) - suffix]


def _common(a: _Head, b: _Head) -> int:
    """Length of the common prefix."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length


def _excerpt(text: str) -> str:
    printable = "".join(character if character.isprintable() else " " for character in text)
    return " ".join(printable.split())[:MAX_EXCERPT_CHARS]


def _store(connection: sqlite3.Connection, finding: Finding) -> None:
    # The count begins anew after a week without a finding.
    connection.execute(
        "INSERT INTO findings VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (user) DO UPDATE SET position = excluded.position,"
        " lost_tokens = excluded.lost_tokens, excerpt = excluded.excerpt, last_seen = excluded.last_seen,"
        " count = CASE WHEN excluded.last_seen - last_seen > ? THEN 1 ELSE count + 1 END",
        (
            finding.user,
            finding.position,
            finding.lost_tokens,
            finding.excerpt,
            finding.count,
            finding.last_seen,
            FORGET_S,
        ),
    )
    connection.execute(
        "DELETE FROM findings WHERE user IN (SELECT user FROM findings ORDER BY last_seen DESC LIMIT -1 OFFSET ?)",
        (MAX_FINDINGS,),
    )
