"""Whole answers of deterministic queries. A query that was answered before costs a lookup.

Only an exact match counts, after ``normalise`` on the last message. Whether a query is deterministic, and whether the
client wants a cached answer, is the caller's to decide.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from edge_llm.cache.normalise import normalise
from edge_llm.cache.state_db import ErasureWatch

if TYPE_CHECKING:
    import sqlite3

    from edge_llm.cache.state_db import StateDb

# What SQLite keeps for a row beside its values: headers, both indexes, the unused rest of a page.
ROW_OVERHEAD_BYTES: Final = 160
_CHECKSUM_BYTES: Final = 16


@dataclass(frozen=True)
class CachedResponse:
    """An answer as it was given. ``finish_reason`` is stop or length; the counts are in tokens.

    ``actions`` are those of a domain bundle, as JSON.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    kind: str = "chat"
    actions: bytes = b"[]"


@dataclass(frozen=True)
class ResponseStats:
    """What the file holds over all users and scopes; ``hits`` counts those of the rows that are still there."""

    entries: int
    nbytes: int
    hits: int


def response_key(*, messages: Sequence[tuple[str, str]], settings: Mapping[str, object], history: bytes) -> bytes:
    """32 bytes that are equal for queries with the same answer, within one scope and user.

    Args:
        messages: (role, content) of the query. The content of the last is compared normalised, the others exactly.
        settings: what generation depends on (temperature, max_tokens, stop, …): JSON values.
        history: digest of the session's state before the query; empty without a session.

    Raises:
        TypeError: a setting is no JSON value.
        ValueError: a setting is not finite.
    """
    compared = [list(message) for message in messages]
    if compared:
        role, content = compared[-1]
        # Punctuation alone normalises to nothing, and "?" is not "!".
        compared[-1] = [role, normalise(content) or content]
    # JSON escapes what separates its parts, so two different queries never read the same.
    canonical = json.dumps([compared, dict(settings), history.hex()], sort_keys=True, allow_nan=False)
    return hashlib.blake2b(canonical.encode("ascii"), digest_size=32).digest()


def response_stats(db: StateDb) -> ResponseStats:
    """Figures of the whole file; zeros if it cannot be read."""
    rows = db.read("SELECT count(*), coalesce(sum(nbytes), 0), coalesce(sum(hits), 0) FROM responses")
    return ResponseStats(*rows[0]) if rows else ResponseStats(0, 0, 0)


def clear_responses(db: StateDb, user: str | None = None) -> int | None:
    """Erase the answers of one user, or all of them, in every scope; waits for the disk.

    Returns:
        How many rows went, or None if the file could not be written.
    """
    return db.erase_rows("responses", user)


class ResponseCache:
    """Answers of one scope, in the state file. Thread-safe; no method but ``clear`` waits for a disk's writes.

    The bounds hold for the whole file, all users and scopes together: the least recently used answers go first, among
    them those of bundles that are served no more.

    Args:
        db: the state file.
        scope: hex digest of what is common to all queries of this device: bundle, graph, template, system prompt.
        max_entries: the most answers.
        max_bytes: the most bytes of answers, keys and a fixed overhead for each. A longer answer is not kept.
    """

    def __init__(self, db: StateDb, *, scope: str, max_entries: int, max_bytes: int) -> None:
        self._db = db
        self._scope = scope
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        # Answers on their way to the disk, so that a repeated query hits at once.
        self._pending: dict[tuple[str, bytes], CachedResponse] = {}
        self._watch = ErasureWatch(db)
        db.write(self._trim)  # the bounds may have become smaller since the last start

    def find(self, user: str, key: bytes) -> CachedResponse | None:
        """The answer that ``user`` got to this query in this scope. It counts as a hit, and as used now."""
        response = self._look_up(user, key)
        if response is not None:
            self._db.write(lambda connection: self._touch(connection, user, key))
        return response

    def holds(self, user: str, key: bytes) -> bool:
        """Whether ``find`` would have an answer, without counting one: to know what need not be answered ahead."""
        return self._look_up(user, key) is not None

    def put(self, user: str, key: bytes, response: CachedResponse) -> None:
        """Keep an answer, replacing an older one; it is found at once and written soon."""
        row = (user, self._scope, key)
        try:
            body = _pack(row, response)
        except UnicodeEncodeError:
            return  # lone surrogates are no text that anybody will ask for again
        nbytes = len(body) + len(key) + len(user) + len(self._scope) + ROW_OVERHEAD_BYTES
        if nbytes > self._max_bytes:
            return
        self._forget_erased()
        pending = (user, key)
        with self._lock:
            self._pending[pending] = response

        def job(connection: sqlite3.Connection) -> None:
            connection.execute(
                "INSERT INTO responses"
                " VALUES (?, ?, ?, ?, ?, 0, (SELECT coalesce(max(last_used), 0) + 1 FROM responses))"
                " ON CONFLICT (user, scope, key)"
                " DO UPDATE SET body = excluded.body, nbytes = excluded.nbytes, last_used = excluded.last_used",
                (*row, body, nbytes),
            )
            self._trim(connection)

        def done() -> None:
            with self._lock:
                # A newer answer to the same query may be waiting by now.
                if self._pending.get(pending) is response:
                    del self._pending[pending]

        if not self._db.write(job, done):
            done()

    def clear(self, user: str | None = None) -> int | None:
        """Erase the answers of one user, or all, in every scope. Waits for the disk: not for the engine's thread.

        Returns:
            How many rows went, or None if the file could not be written.
        """
        removed = clear_responses(self._db, user)
        with self._lock:
            self._pending = {pending: kept for pending, kept in self._pending.items() if user not in (None, pending[0])}
            self._watch.erased()  # by ourselves
        return removed

    @property
    def entries(self) -> int:
        """Answers in the file, over all users and scopes."""
        # Counted by an index: the sums of ``response_stats`` read every row.
        rows = self._db.read("SELECT count(*) FROM responses")
        return int(rows[0][0]) if rows else 0

    @property
    def nbytes(self) -> int:
        """Their accounted size in bytes, never above ``max_bytes`` once written."""
        return response_stats(self._db).nbytes

    def _look_up(self, user: str, key: bytes) -> CachedResponse | None:
        """Among what waits for the disk, then in the file. A damaged row is a miss, and goes."""
        self._forget_erased()
        with self._lock:
            response = self._pending.get((user, key))
        if response is not None:
            return response
        row = (user, self._scope, key)
        rows = self._db.read("SELECT body FROM responses WHERE user = ? AND scope = ? AND key = ?", row)
        if not rows:
            return None
        response = _unpack(row, rows[0][0])
        if response is None:
            delete = "DELETE FROM responses WHERE user = ? AND scope = ? AND key = ?"
            self._db.write(lambda connection: connection.execute(delete, row))
        return response

    def _forget_erased(self) -> None:
        with self._lock:
            if self._watch.erased():
                self._pending.clear()

    def _touch(self, connection: sqlite3.Connection, user: str, key: bytes) -> None:
        # A count instead of a time: clocks of small boards jump.
        connection.execute(
            "UPDATE responses SET hits = hits + 1, last_used = (SELECT max(last_used) + 1 FROM responses)"
            " WHERE user = ? AND scope = ? AND key = ?",
            (user, self._scope, key),
        )

    def _trim(self, connection: sqlite3.Connection) -> None:
        """Least recently used rows go until both bounds hold."""
        # As floating point: a size that was damaged must neither overflow nor be no number.
        select = "SELECT count(*), total(nbytes) FROM responses"
        entries, nbytes = connection.execute(select).fetchone()
        while entries > self._max_entries or nbytes > self._max_bytes:
            # By use, as the index is: one row is read at a time.
            rowid, freed = connection.execute(
                "SELECT rowid, CAST(nbytes AS REAL) FROM responses ORDER BY last_used LIMIT 1"
            ).fetchone()
            connection.execute("DELETE FROM responses WHERE rowid = ?", (rowid,))
            entries, nbytes = entries - 1, nbytes - freed


def _pack(row: tuple[str, str, bytes], response: CachedResponse) -> bytes:
    packed = msgspec.msgpack.encode(response)
    return _checksum(row, packed) + packed


def _unpack(row: tuple[str, str, bytes], body: object) -> CachedResponse | None:
    """The answer, or None if it is not what was written: SQLite has no checksums, and flash memory forgets."""
    if not isinstance(body, bytes):
        return None
    checksum, packed = body[:_CHECKSUM_BYTES], body[_CHECKSUM_BYTES:]
    if checksum != _checksum(row, packed):
        return None
    try:
        return msgspec.msgpack.decode(packed, type=CachedResponse)
    except msgspec.MsgspecError:  # a row of another version
        return None


def _checksum(row: tuple[str, str, bytes], packed: bytes) -> bytes:
    user, scope, key = row
    head = f"{user}\0{scope}\0".encode() + key
    return hashlib.blake2b(head + packed, digest_size=_CHECKSUM_BYTES).digest()
