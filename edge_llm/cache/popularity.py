"""What each user asks often, with old questions counting less and less: it says what a user is about to ask.

A prefix of what is being said stands for a range of the user's queries in sorted order, so the sorted list serves as
the tree. The state file holds every user's queries; those of the users active now are mirrored in memory.
"""

from __future__ import annotations

import math
import threading
import time
from bisect import bisect_left
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from edge_llm.cache.normalise import normalise
from edge_llm.cache.state_db import ErasureWatch

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterator

    from edge_llm.cache.state_db import StateDb

HALF_LIFE_S: Final = 7 * 86_400.0
MAX_QUERIES_PER_USER: Final = 200
MAX_QUERIES: Final = 2000
MAX_QUERY_CHARS: Final = 300
# Asked at least twice, not too long ago.
MIN_WEIGHT: Final = 1.5
MAX_MIRRORED_USERS: Final = 64
_MAX_LOG2_WEIGHT: Final = 32.0


@dataclass(frozen=True)
class Prediction:
    """A query that would complete what was said, and its share (0 to 1) among all that would."""

    text: str
    confidence: float


@dataclass
class _Query:
    """``weight`` is how often it was asked, decayed up to the moment ``at`` (seconds since 1970)."""

    text: str
    weight: float
    at: float


@dataclass
class _Mirror:
    """One user's queries by their normal form, which ``order`` lists sorted."""

    queries: dict[str, _Query] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)

    def put(self, normal: str, query: _Query) -> None:
        if normal not in self.queries:
            self.order.insert(bisect_left(self.order, normal), normal)
        self.queries[normal] = query

    def remove(self, normal: str) -> None:
        del self.queries[normal]
        del self.order[bisect_left(self.order, normal)]

    def beginning_with(self, prefix: str) -> Iterator[_Query]:
        for index in range(bisect_left(self.order, prefix), len(self.order)):
            if not self.order[index].startswith(prefix):
                return
            yield self.queries[self.order[index]]


def popular_counts(db: StateDb) -> dict[str, int]:
    """How many queries the file holds of each user."""
    return dict(db.read("SELECT user, count(*) FROM popular GROUP BY user ORDER BY user") or [])


def clear_popular(db: StateDb, user: str | None = None) -> int | None:
    """Erase the queries of one user, or all; waits for the disk. Returns how many, None if it failed."""
    return db.erase_rows("popular", user)


class Popularity:
    """Decayed counts of past queries by user. Thread-safe; a user's queries never show in another's predictions.

    A query counts 1 when asked, half as much after ``half_life_s``. Beyond the bounds those with the lowest weight go.

    Args:
        db: the state file.
        half_life_s: seconds after which a query counts half.
        max_queries_per_user: bound on different queries of one user.
        max_queries: bound on those of all users.
        clock: seconds since 1970. It may jump, as on a board without a battery: nothing decays backwards.
    """

    def __init__(
        self,
        db: StateDb,
        *,
        half_life_s: float = HALF_LIFE_S,
        max_queries_per_user: int = MAX_QUERIES_PER_USER,
        max_queries: int = MAX_QUERIES,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._db = db
        self._half_life_s = half_life_s
        self._max_queries_per_user = max_queries_per_user
        self._max_queries = max_queries
        self._clock = clock
        self._lock = threading.Lock()
        self._mirrors: OrderedDict[str, _Mirror] = OrderedDict()
        self._watch = ErasureWatch(db)

    def record(self, user: str, text: str) -> None:
        """Count a query that was really asked. One without words or longer than 300 characters is not remembered."""
        normal = normalise(text)
        if not normal or len(text) > MAX_QUERY_CHARS or not _is_utf8(text):
            return
        now = self._clock()
        with self._lock:
            mirror = self._mirror(user)
            known = mirror.queries.get(normal)
            weight = 1.0 + (self._decayed(known.weight, known.at, now) if known else 0.0)
            mirror.put(normal, _Query(text, weight, now))
            if len(mirror.order) > self._max_queries_per_user:
                others = ((self._weight(q, now), q.at, name) for name, q in mirror.queries.items() if name != normal)
                mirror.remove(min(others)[2])
        self._db.write(lambda connection: self._add(connection, user, normal, text, now))

    def known(self, user: str, text: str) -> str | None:
        """The latest spelling of a query of this user that differs from ``text`` in nothing that counts."""
        normal = normalise(text)
        with self._lock:
            query = self._mirror(user).queries.get(normal)
            return query.text if query else None

    def predict(self, user: str, partial_text: str) -> Prediction | None:
        """The likeliest query of this user that begins like ``partial_text``; its last word may be unfinished.

        None if nothing begins like it, or if the likeliest was not asked twice in recent times.
        """
        prefix = normalise(partial_text)
        if not prefix:
            return None
        now = self._clock()
        with self._lock:
            weighted = [(self._weight(query, now), query) for query in self._mirror(user).beginning_with(prefix)]
        weight, best = max(weighted, key=lambda pair: (pair[0], pair[1].at), default=(0.0, None))
        if best is None or weight < MIN_WEIGHT:
            return None
        return Prediction(best.text, weight / math.fsum(weight for weight, _ in weighted))

    def top(self, user: str, count: int) -> list[str]:
        """Up to ``count`` queries of this user, the weightiest first."""
        now = self._clock()
        with self._lock:
            queries = list(self._mirror(user).queries.values())
        queries.sort(key=lambda query: (-self._weight(query, now), -query.at, query.text))
        return [query.text for query in queries[:count]]

    def users(self) -> list[str]:
        """Everybody who has queries here, the most recently active first."""
        # Damaged values have other types.
        sound = "typeof(user) = 'text' AND typeof(at) = 'real'"
        rows = self._db.read(f"SELECT user, max(at) FROM popular WHERE {sound} GROUP BY user") or []  # noqa: S608
        active: dict[str, float] = dict(rows)
        with self._lock:
            self._forget_erased()
            # What was just asked may not be in the file yet.
            for user, mirror in self._mirrors.items():
                for query in mirror.queries.values():
                    active[user] = max(active.get(user, query.at), query.at)
        return sorted(active, key=lambda user: (-active[user], user))

    def clear(self, user: str | None = None) -> int | None:
        """Forget one user's queries, or all. Waits for the disk: not for the engine's thread.

        Returns:
            How many went from the file, or None if it could not be written.
        """
        removed = clear_popular(self._db, user)
        with self._lock:
            self._forget_erased()
            for name in [user] if user is not None else list(self._mirrors):
                self._mirrors.pop(name, None)
        return removed

    def forget_mirrors(self) -> None:
        """Drop what is in memory; what the file still holds is read again when it is needed."""
        with self._lock:
            self._mirrors.clear()

    def _mirror(self, user: str) -> _Mirror:
        """The user's queries in memory, read from the file if they are not there. Under the lock."""
        self._forget_erased()
        mirror = self._mirrors.get(user)
        if mirror is None:
            mirror = _Mirror()
            rows = self._db.read(
                "SELECT normal, text, log2_weight, at FROM popular WHERE user = ? ORDER BY normal", (user,)
            )
            for normal, text, log2_weight, at in rows or []:
                if _is_sound(log2_weight, at):
                    mirror.put(str(normal), _Query(str(text), 2.0**log2_weight, at))
            if rows is None:
                return mirror  # it could not be read now: not kept, so that it is tried again
            self._mirrors[user] = mirror
            if len(self._mirrors) > MAX_MIRRORED_USERS:
                self._mirrors.popitem(last=False)
        self._mirrors.move_to_end(user)
        return mirror

    def _forget_erased(self) -> None:
        if self._watch.erased():
            self._mirrors.clear()

    def _weight(self, query: _Query, now: float) -> float:
        return self._decayed(query.weight, query.at, now)

    def _decayed(self, weight: float, at: float, now: float) -> float:
        return weight * math.pow(0.5, max(0.0, now - at) / self._half_life_s)

    def _add(self, connection: sqlite3.Connection, user: str, normal: str, text: str, now: float) -> None:
        """Count in the file, where another process may have counted too; then keep the bounds."""
        found = connection.execute(
            "SELECT log2_weight, at FROM popular WHERE user = ? AND normal = ?", (user, normal)
        ).fetchone()
        weight = 1.0 + (self._decayed(2.0 ** found[0], found[1], now) if found and _is_sound(*found) else 0.0)
        connection.execute(
            "INSERT OR REPLACE INTO popular VALUES (?, ?, ?, ?, ?)", (user, normal, text, math.log2(weight), now)
        )
        for where, parameters, bound in (
            ("user = ?", (user,), self._max_queries_per_user),
            ("true", (), self._max_queries),
        ):
            (count,) = connection.execute(f"SELECT count(*) FROM popular WHERE {where}", parameters).fetchone()  # noqa: S608
            if count > bound:
                # The logarithm of the weight falls by one every half-life. The new query stays, or none ever came in.
                connection.execute(
                    "DELETE FROM popular WHERE (user, normal) IN ("  # noqa: S608
                    f" SELECT user, normal FROM popular WHERE {where} AND NOT (user = ? AND normal = ?)"
                    " ORDER BY log2_weight + min(at - ?, 0) / ?, at, normal LIMIT ?)",
                    (*parameters, user, normal, now, self._half_life_s, count - bound),
                )


def _is_sound(log2_weight: object, at: object) -> bool:
    """The file has no checksums: a number that was damaged must not raise, nor outweigh all others for years."""
    return isinstance(at, float) and isinstance(log2_weight, float) and 0 <= log2_weight <= _MAX_LOG2_WEIGHT


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
