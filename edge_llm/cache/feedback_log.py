"""What went wrong, for the people who write the pack: refused, failed and rated answers, on the device only."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import msgspec

if TYPE_CHECKING:
    import sqlite3

    from edge_llm.cache.state_db import Row, StateDb

Reason = Literal["refused", "failed", "rated"]
_MAX_CHARS: Final = 2000


@dataclass(frozen=True)
class FeedbackEntry:
    """One answer that somebody should look at. ``actions`` is JSON as on the wire; ``at`` is Unix time in seconds."""

    user: str
    reason: Reason
    text: str
    kind: str
    actions: str
    answer: str
    rating: int | None = None
    correction: str | None = None
    at: float = 0.0


class FeedbackLog:
    """Entries in the state file. Thread-safe; ``record`` does not wait for the disk.

    Args:
        db: the state file.
        max_entries: the oldest go first.
    """

    def __init__(self, db: StateDb, max_entries: int) -> None:
        self._db = db
        self._max_entries = max_entries

    def record(self, entry: FeedbackEntry) -> None:
        """Remember an answer."""
        row = (
            entry.user,
            entry.at or time.time(),
            entry.reason,
            entry.text[:_MAX_CHARS],
            entry.kind,
            entry.actions,
            entry.answer[:_MAX_CHARS],
            entry.rating,
            None if entry.correction is None else entry.correction[:_MAX_CHARS],
        )

        def job(connection: sqlite3.Connection) -> None:
            connection.execute(
                "INSERT INTO feedback (user, at, reason, text, kind, actions, answer, rating, correction)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                row,
            )
            connection.execute(
                "DELETE FROM feedback WHERE id <= (SELECT id FROM feedback ORDER BY id DESC LIMIT 1 OFFSET ?)",
                (self._max_entries,),
            )

        self._db.write(job)


def stored_feedback(db: StateDb, user: str | None = None) -> list[FeedbackEntry]:
    """What the file holds, the oldest first."""
    where, parameters = ("", ()) if user is None else (" WHERE user = ?", (user,))
    columns = ", ".join(FeedbackEntry.__dataclass_fields__)
    rows = db.read(f"SELECT {columns} FROM feedback{where} ORDER BY id", parameters)  # noqa: S608
    return [entry for row in rows or () if (entry := _entry(row)) is not None]


def feedback_count(db: StateDb) -> int:
    """Entries in the file, over all users."""
    rows = db.read("SELECT count(*) FROM feedback")
    return int(rows[0][0]) if rows else 0


def clear_feedback(db: StateDb, user: str | None = None) -> int | None:
    """Erase one user's entries, or all of them; waits for the disk.

    Returns:
        How many went, or None if the file could not be written.
    """
    return db.erase_rows("feedback", user)


def _entry(row: Row) -> FeedbackEntry | None:
    """None if a value was damaged: the file has no checksums."""
    names = FeedbackEntry.__dataclass_fields__
    try:
        return msgspec.convert(dict(zip(names, row, strict=True)), FeedbackEntry)
    except msgspec.ValidationError:
        return None
