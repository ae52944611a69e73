"""One SQLite file for what outlives a process: answers, popular queries, findings about prompts, feedback.

Nothing in it is needed: a damaged or deleted file is made anew, and while no file can be used the daemon goes on in
memory. Reads run on the caller's thread. Writes are queued to one thread of their own, since no answer may wait for a
disk. Several processes may have the file open at once: daemons, and ``edge-llm cache clear``.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from edge_llm.cache.state_file import Connections, file_identity, is_damage, open_file, open_memory
from edge_llm.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_log = logging.getLogger(__name__)

STATE_FILE: Final = "state.sqlite3"
MAX_QUEUED: Final = 1024
_MAX_BATCH: Final = 256
# Writes that come close together share a transaction: flash memory wears with each.
_LINGER_S: Final = 0.2
# While nothing is written, how often the path is looked at: SQLite goes on with a file that has been deleted.
_LOOK_INTERVAL_S: Final = 1.0
# How often a file that cannot be used is tried again.
_RETRY_INTERVAL_S: Final = 5.0
_LOG_INTERVAL_S: Final = 60.0
_CLOSE_TIMEOUT_S: Final = 5.0
_ERASE_TIMEOUT_S: Final = 10.0

Row = tuple[Any, ...]


def state_path(cache_folder: Path) -> Path:
    """Where the file lies under the cache directory."""
    return cache_folder / STATE_FILE


@dataclass(eq=False)
class _Write:
    """Something to be done in the writer's next transaction. ``done`` is called once it is settled either way.

    ``generation`` is the one that was last seen when it was queued.
    """

    job: Callable[[sqlite3.Connection], object]
    generation: int | None
    done: Callable[[], None] | None = None
    erases: bool = False
    result: object = None
    written: bool = False


class StateDb:
    """The file, open. Thread-safe; made by ``open`` and closed by ``close``.

    No method raises for what a disk or another process does. ``dropped`` counts writes that found the queue full,
    ``failed`` those that the disk or another process refused.
    """

    def __init__(self, path: Path | None, connections: Connections) -> None:
        self._path = path
        self._connections = connections
        self._lock = threading.Lock()  # of the reader, and of which connections are used
        self._changed = threading.Condition()
        self._queue: deque[_Write] = deque()
        self._queued = 0
        self._settled = 0
        self._flushing = 0
        self._closing = False
        self._closed = False
        self._damaged = False
        self._failing = False
        self._last_logged: float | None = None
        # Where there is a path and no file, that has been logged.
        self._retry_at = time.monotonic() + _RETRY_INTERVAL_S
        self._generation = self.generation()  # last seen
        self.dropped = 0
        self.failed = 0
        self._thread = threading.Thread(target=self._run, name="state-writer", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, path: Path) -> StateDb:
        """Open the file, or make it with its folder (mode 0600).

        A damaged file, or one of another version, is emptied. While no file can be used at all the database is in
        memory, and begins anew with the file. Both are logged; nothing is raised.
        """
        try:
            return cls(path, open_file(path))
        except (OSError, sqlite3.Error) as error:
            _warn_unusable(path, error)
            return cls(path, open_memory())

    @classmethod
    def volatile(cls) -> StateDb:
        """A database in memory, which ends with the process and which no other process can see."""
        return cls(None, open_memory())

    @property
    def in_memory(self) -> bool:
        """Whether there is no file behind it now."""
        return self._connections.file is None

    def read(self, sql: str, parameters: tuple[object, ...] = ()) -> list[Row] | None:
        """All rows of a query; None if it failed, which is to be treated like a miss."""
        with self._lock:
            if self._closed:
                return None
            try:
                return self._connections.reader.execute(sql, parameters).fetchall()
            except (sqlite3.Error, UnicodeDecodeError) as error:
                failure: Exception = error
        self._note_failure("read from", failure)
        return None

    def generation(self) -> int | None:
        """A number that changes when any process has erased something; None if it cannot be read now.

        Who keeps rows in memory compares it before use, and forgets what it kept when it has changed.
        """
        rows = self.read("SELECT value FROM generation")
        if not rows:
            return None
        generation: int = rows[0][0]
        self._generation = generation
        return generation

    def write(self, job: Callable[[sqlite3.Connection], object], done: Callable[[], None] | None = None) -> bool:
        """Have ``job(connection)`` run soon on the writer's thread, in a transaction with its neighbours.

        Args:
            job: SQL to execute; an exception undoes and forgets the whole transaction.
            done: called on the writer's thread after the commit, or when the write was given up.

        Returns:
            False if the queue was full or the database is closed: nothing will be called then.
        """
        return self._enqueue(_Write(job, self._generation, done))

    def erase(self, job: Callable[[sqlite3.Connection], int]) -> int | None:
        """Run ``job``, which removes rows, and wait for it. Not for the engine's thread.

        Writes that other processes have queued by then are dropped, their mirrors in memory are forgotten at the next
        use, and what was removed is overwritten in the file.

        Returns:
            What ``job`` returned, or None if nothing could be erased; the reason is in the log.
        """

        def run(connection: sqlite3.Connection) -> int:
            connection.execute("UPDATE generation SET value = random()")
            return job(connection)

        write = _Write(run, self._generation, erases=True)
        if not (self._enqueue(write) and self.flush(_ERASE_TIMEOUT_S) and write.written):
            return None
        assert isinstance(write.result, int)
        return write.result

    def erase_rows(
        self, table: Literal["responses", "popular", "findings", "feedback"], user: str | None
    ) -> int | None:
        """``erase`` one user's rows of a table, or all of them."""
        where, parameters = ("", ()) if user is None else (" WHERE user = ?", (user,))
        return self.erase(lambda connection: connection.execute(f"DELETE FROM {table}{where}", parameters).rowcount)  # noqa: S608

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that was queued before is written or given up. False if that took longer."""
        with self._changed:
            target = self._queued
            self._flushing += 1
            self._changed.notify_all()
            try:
                return self._changed.wait_for(lambda: self._settled >= target, timeout_s)
            finally:
                self._flushing -= 1

    def close(self) -> None:
        """Write what is queued, within seconds, and close the file. Further calls do nothing."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(_CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            return  # a disk that hangs; the process is about to end anyway
        with self._lock:
            if not self._closed:
                self._closed = True
                self._connections.close()

    def _enqueue(self, write: _Write) -> bool:
        with self._changed:
            if self._closing or len(self._queue) >= MAX_QUEUED:
                self.dropped += 1
                return False
            self._queue.append(write)
            self._queued += 1
            self._changed.notify_all()
        return True

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._queue or self._closing, None if self._path is None else _LOOK_INTERVAL_S
                )
                if self._queue:
                    self._changed.wait_for(
                        lambda: self._flushing or self._closing or len(self._queue) >= _MAX_BATCH, _LINGER_S
                    )
                elif self._closing:
                    return
                batch = [self._queue.popleft() for _ in range(min(len(self._queue), _MAX_BATCH))]
            if self._path is not None:
                self._look_after(self._path)
            if not batch:
                continue
            self._write_batch(batch)
            for write in batch:
                if write.done is not None:
                    write.done()
            with self._changed:
                self._settled += len(batch)
                self._changed.notify_all()

    def _write_batch(self, batch: list[_Write]) -> None:
        connection = self._connections.writer
        try:
            # In memory the one connection serves both sides, in turns.
            with self._lock if self.in_memory else contextlib.nullcontext():
                try:
                    self._transact(connection, batch)
                except BaseException:
                    # SQLite itself has ended the transaction after some errors, a full disk among them.
                    if connection.in_transaction:
                        connection.execute("ROLLBACK")
                    raise
        except Exception as error:  # a fault in one job must not end the thread
            self.failed += len(batch)
            self._note_failure("write to", error)
            return
        self._failing = False
        if any(write.erases for write in batch):
            # The log of changes still holds the words that were erased; if a reader is in the way, a later one does it.
            with contextlib.suppress(sqlite3.Error):
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def _transact(self, connection: sqlite3.Connection, batch: list[_Write]) -> None:
        connection.execute("BEGIN IMMEDIATE")
        generation = _generation_of(connection)
        for write in batch:
            if write.erases:
                write.result = write.job(connection)
                generation = _generation_of(connection)
            elif write.generation == generation:
                write.job(connection)
            # Else it was queued before another process erased, or at that time: it would bring erased words back.
        connection.execute("COMMIT")
        self._generation = generation
        for write in batch:
            write.written = True

    def _look_after(self, path: Path) -> None:
        """See that the open file is sound and still lies at ``path``; if not, open or make one, if need be later.

        Until then it goes on in memory. Writer's thread only.
        """
        was_in_memory = self.in_memory
        is_there = not was_in_memory and file_identity(path) == self._connections.file
        if (is_there and not self._damaged) or (was_in_memory and time.monotonic() < self._retry_at):
            return
        if not was_in_memory:
            # First of all: what somebody has deleted must not be found any more.
            self._use(open_memory())
        self._damaged = False
        try:
            # Without the lock: readers must not wait for a disk.
            self._use(open_file(path))
        except (OSError, sqlite3.Error) as error:
            self._retry_at = time.monotonic() + _RETRY_INTERVAL_S
            if not was_in_memory:
                _warn_unusable(path, error)
            return
        if was_in_memory:
            _log.info("the state file is used again", extra={"path": str(path)})
        elif not is_there:
            _log.warning("the state file was deleted or replaced, and is opened anew", extra={"path": str(path)})

    def _use(self, connections: Connections) -> None:
        """Go on with these. The generation is another one, so mirrors are forgotten, and writes queued so far."""
        generation = _generation_of(connections.writer)
        with self._lock:
            before, self._connections = self._connections, connections
            self._generation = generation
        # SQLite notices when a file has moved away, and leaves the log of the new one in its place alone.
        before.close()

    def _note_failure(self, what: str, error: Exception) -> None:
        self._damaged = self._damaged or is_damage(error)
        now = time.monotonic()
        # A disk stays full for long, and one line says so; one that comes and goes is news once a minute.
        if self._failing or (self._last_logged is not None and now - self._last_logged < _LOG_INTERVAL_S):
            return
        self._failing = True
        self._last_logged = now
        _log.warning("could not %s the state file", what, extra={"path": str(self._path), "reason": str(error)})


def _warn_unusable(path: Path, error: Exception) -> None:
    _log.warning(
        "the state file cannot be used: answers and popular queries are kept in memory only, until it can",
        extra={"path": str(path), "reason": str(error)},
    )


@contextlib.contextmanager
def existing_state(path: Path) -> Iterator[StateDb | None]:
    """The file for a command that reads or erases; None if there is no file, and none is made.

    Raises:
        ConfigError: it is there but cannot be used.
    """
    if not path.exists():
        yield None
        return
    with contextlib.closing(StateDb.open(path)) as db:
        if db.in_memory:
            raise ConfigError(f"{path} cannot be used: does it belong to this user, and is the disk writable?")
        yield db


class ErasureWatch:
    """Tells those who keep rows in memory when they must forget them. Not thread-safe: each has its own.

    Args:
        db: the state file.
    """

    def __init__(self, db: StateDb) -> None:
        self._db = db
        self._generation = db.generation()

    def erased(self) -> bool:
        """Whether any process has erased something since the last call."""
        generation = self._db.generation()
        if generation is None or generation == self._generation:
            return False
        self._generation = generation
        return True


def _generation_of(connection: sqlite3.Connection) -> int:
    (value,) = connection.execute("SELECT value FROM generation").fetchone()
    assert isinstance(value, int)
    return value
