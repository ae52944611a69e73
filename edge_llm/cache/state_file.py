"""How the state file comes to be: made, checked, emptied if it is damaged, opened for reading and for writing."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_log = logging.getLogger(__name__)

SCHEMA_VERSION: Final = 2
_OPEN_TIMEOUT_S: Final = 5.0
_WRITE_TIMEOUT_MS: Final = 2000
# Readers of a WAL wait for nobody, except for a moment while another process recovers it. A miss is quicker.
_READ_TIMEOUT_MS: Final = 2
_WAL_LIMIT_BYTES: Final = 1 << 20

# ``generation`` is one random number that changes with every erasure, so that other processes notice it.
_SCHEMA: Final = """
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS generation (value INTEGER NOT NULL);
INSERT INTO generation SELECT random() WHERE NOT EXISTS (SELECT 1 FROM generation);
CREATE TABLE IF NOT EXISTS responses (
    user TEXT NOT NULL, scope TEXT NOT NULL, key BLOB NOT NULL, body BLOB NOT NULL,
    nbytes INTEGER NOT NULL, hits INTEGER NOT NULL, last_used INTEGER NOT NULL, PRIMARY KEY (user, scope, key)
);
CREATE INDEX IF NOT EXISTS responses_by_use ON responses (last_used, nbytes);
CREATE TABLE IF NOT EXISTS popular (
    user TEXT NOT NULL, normal TEXT NOT NULL, text TEXT NOT NULL, log2_weight REAL NOT NULL, at REAL NOT NULL,
    PRIMARY KEY (user, normal)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS findings (
    user TEXT NOT NULL PRIMARY KEY, position INTEGER NOT NULL, lost_tokens INTEGER NOT NULL, excerpt TEXT NOT NULL,
    count INTEGER NOT NULL, last_seen REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS feedback (
    id INTEGER PRIMARY KEY, user TEXT NOT NULL, at REAL NOT NULL, reason TEXT NOT NULL, text TEXT NOT NULL,
    kind TEXT NOT NULL, actions TEXT NOT NULL, answer TEXT NOT NULL, rating INTEGER, correction TEXT
);
"""


FileIdentity = tuple[int, int]


@dataclass
class Connections:
    """One for reading and one for writing; in memory they are the same, and there is no file."""

    reader: sqlite3.Connection
    writer: sqlite3.Connection
    file: FileIdentity | None = None

    def close(self) -> None:
        """Close both; what goes wrong then concerns nobody."""
        with contextlib.suppress(sqlite3.Error):
            self.reader.close()
        with contextlib.suppress(sqlite3.Error):
            self.writer.close()


def open_file(path: Path) -> Connections:
    """Open the file, or make it with its folder; one that is damaged, or of another version, is emptied.

    Raises:
        OSError, sqlite3.Error: no file can be used there: no permission, a full disk, a read-only file system.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path):
        try:
            return _connect(path)
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            if not (is_damage(error) or _is_newer_format(path)):
                raise
            # Not moved aside: it would hold a user's words where no command erases them.
            _log.warning("the state file is damaged and is made anew", extra={"path": str(path), "reason": str(error)})
            for damaged in state_files(path):
                damaged.unlink(missing_ok=True)
            return _connect(path)


def file_identity(path: Path) -> FileIdentity | None:
    """Device and inode of what a path leads to now; None if that is nothing, or cannot be told."""
    try:
        return _identity(path)
    except OSError:
        return None


def _identity(path: Path) -> FileIdentity:
    status = path.stat()
    return status.st_dev, status.st_ino


def open_memory() -> Connections:
    """A database that ends with the process."""
    connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    _set_up(connection)
    return Connections(connection, connection)


def remove_state(path: Path) -> bool:
    """Delete the database and the files beside it. False if there was none. Raises ``OSError``."""
    there = [file for file in state_files(path) if file.exists()]
    for file in there:
        file.unlink(missing_ok=True)
    return bool(there)


def state_files(path: Path) -> list[Path]:
    """The database and the files that SQLite keeps beside it, whether or not they exist now."""
    return [path, *(path.with_name(path.name + suffix) for suffix in ("-wal", "-shm", "-journal"))]


def is_damage(error: Exception) -> bool:
    """Whether SQLite met something that it did not write, unlike a full disk or a lock."""
    # "malformed" and "not a database" are plain DatabaseErrors, all else is a subclass. And Python stumbles over a
    # message that quotes damaged text.
    return type(error) is sqlite3.DatabaseError or isinstance(error, UnicodeDecodeError)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time repairs: a second would throw away what the first has just made."""
    lock = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _is_newer_format(path: Path) -> bool:
    """Whether the header asks for a later SQLite, which makes the file read-only to this one: it was damaged there.

    See "The Database Header" in the SQLite file format: versions at 18 and 19, format of the schema at 44.
    """
    with path.open("rb") as stream:
        header = stream.read(100)
    return len(header) == 100 and (max(header[18:20]) > 2 or int.from_bytes(header[44:48], "big") > 4)


def _connect(path: Path) -> Connections:
    # SQLite gives the files beside it the mode of this one. An existing one is not opened here: closing it again would
    # give up the locks that this process may hold on it (fcntl(2)).
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    path.chmod(0o600)
    # Before it is opened: if another one takes its place in between, that shows at the next look.
    identity = _identity(path)
    writer = sqlite3.connect(path, _OPEN_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    try:
        writer.execute("PRAGMA journal_mode = WAL").fetchall()
        _set_up(writer)
        writer.execute(f"PRAGMA busy_timeout = {_WRITE_TIMEOUT_MS}")
        reader = sqlite3.connect(path, _OPEN_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        reader.text_factory = _text
        reader.execute("SELECT count(*) FROM generation").fetchall()
        reader.execute("PRAGMA query_only = ON")
        reader.execute(f"PRAGMA busy_timeout = {_READ_TIMEOUT_MS}")
    except BaseException:
        writer.close()
        raise
    return Connections(reader, writer, identity)


def _set_up(connection: sqlite3.Connection) -> None:
    # What no longer decodes is somebody's to ignore, not to fail at.
    connection.text_factory = _text
    connection.execute("PRAGMA synchronous = NORMAL")
    # What is erased is overwritten with zeros.
    connection.execute("PRAGMA secure_delete = ON").fetchall()
    connection.execute(f"PRAGMA journal_size_limit = {_WAL_LIMIT_BYTES}").fetchall()
    (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise sqlite3.DatabaseError(verdict)
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version == SCHEMA_VERSION:
        _check_tables(connection)
    else:
        _drop_all(connection)
    connection.executescript(f"{_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")


def _check_tables(connection: sqlite3.Connection) -> None:
    """Raises sqlite3.DatabaseError if tables are not what this version makes: quick_check looks at pages only."""
    tables = "SELECT name, sql FROM sqlite_master ORDER BY name"
    with contextlib.closing(sqlite3.connect(":memory:")) as fresh:
        fresh.executescript(f"{_SCHEMA} COMMIT;")
        expected = fresh.execute(tables).fetchall()
    if connection.execute(tables).fetchall() != expected:
        raise sqlite3.DatabaseError("its tables are not those of this version")
    if [type(value) for (value,) in connection.execute("SELECT value FROM generation").fetchall()] != [int]:
        raise sqlite3.DatabaseError("its generation is no number")


def _text(stored: bytes) -> str:
    return stored.decode(errors="replace")


def _drop_all(connection: sqlite3.Connection) -> None:
    """Empty a file of another version in place: a process of that version may have it open."""
    names = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
    for (name,) in names.fetchall():
        quoted = name.replace('"', '""')
        connection.execute(f'DROP TABLE "{quoted}"')
