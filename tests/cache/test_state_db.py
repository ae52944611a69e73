"""The state file: whatever happens to it, the daemon goes on."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_llm.cache import state_file
from edge_llm.cache.state_db import MAX_QUEUED, StateDb, state_path
from edge_llm.cache.state_file import state_files

INSERT = "INSERT OR REPLACE INTO findings VALUES (?, 1, 1, '', 1, 0.0)"
FLUSH_S = 10


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return state_path(tmp_path / "new" / "cache")


@pytest.fixture
def db(path: Path) -> Iterator[StateDb]:
    with contextlib.closing(StateDb.open(path)) as opened:
        yield opened


def add(db: StateDb, name: str) -> bool:
    return db.write(lambda connection: connection.execute(INSERT, (name,)))


def names(db: StateDb) -> list[str] | None:
    rows = db.read("SELECT user FROM findings ORDER BY user")
    return None if rows is None else [name for (name,) in rows]


class Block:
    """Holds the writer's thread inside a job until ``free`` is called."""

    def __init__(self, db: StateDb) -> None:
        self._free = threading.Event()
        self._entered = threading.Event()
        assert db.write(self._wait)
        threading.Thread(target=db.flush, args=(FLUSH_S,)).start()  # so that the writer does not linger
        assert self._entered.wait(FLUSH_S)

    def _wait(self, _connection: object) -> None:
        self._entered.set()
        assert self._free.wait(FLUSH_S)

    def free(self) -> None:
        self._free.set()


def test_what_is_written_survives(path, db):
    add(db, "ann")
    assert db.flush(FLUSH_S)
    assert names(db) == ["ann"]
    add(db, "bob")
    db.close()  # writes what is queued
    with contextlib.closing(StateDb.open(path)) as again:
        assert not again.in_memory
        assert names(again) == ["ann", "bob"]


def test_only_the_owner_may_read_it(path, db):
    add(db, "ann")
    assert db.flush(FLUSH_S)
    for file in [file for file in state_files(path) if file.exists()]:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_file_that_others_could_read_is_closed_to_them(path, db):
    db.close()
    path.chmod(0o644)
    StateDb.open(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_after_closing_nothing_happens(db):
    db.close()
    db.close()
    assert not add(db, "ann")
    assert names(db) is None
    assert db.erase(lambda _: 0) is None


def test_reads_do_not_wait_for_the_writer(db):
    add(db, "ann")
    db.flush(FLUSH_S)
    block = Block(db)
    add(db, "bob")
    assert names(db) == ["ann"]
    assert not db.flush(0.0)
    block.free()
    assert db.flush(FLUSH_S)
    assert names(db) == ["ann", "bob"]


def test_a_full_queue_drops(db):
    block = Block(db)
    settled = []
    for index in range(MAX_QUEUED):
        assert db.write(lambda _: None, lambda index=index: settled.append(index))
    assert not add(db, "too many")
    assert db.dropped == 1
    block.free()
    assert db.flush(FLUSH_S)
    assert settled == list(range(MAX_QUEUED))
    assert add(db, "again")
    assert db.flush(FLUSH_S)
    assert names(db) == ["again"]


def test_a_full_disk_is_forgotten_and_writing_goes_on_afterwards(db, caplog):
    def limit(pages: int) -> None:
        db.write(lambda connection: connection.execute(f"PRAGMA max_page_count = {pages}").fetchall())
        db.flush(FLUSH_S)

    limit(1)  # SQLite takes the present size instead
    settled = []
    for _ in range(3):
        db.write(lambda connection: connection.execute(INSERT, ("x" * 100_000,)), lambda: settled.append(names(db)))
        assert db.flush(FLUSH_S)
    assert settled == [[], [], []]
    assert db.failed == 3
    assert [record.reason for record in caplog.records] == ["database or disk is full"]  # once a minute
    limit(1_000_000)
    add(db, "ann")
    assert db.flush(FLUSH_S)
    assert names(db) == ["ann"]


def test_a_fault_in_one_write_ends_nothing(db):
    db.write(lambda _: 1 / 0)
    db.flush(FLUSH_S)
    add(db, "ann")
    db.flush(FLUSH_S)
    assert names(db) == ["ann"]
    assert db.failed == 1


def test_a_lock_of_another_process_is_waited_for_and_then_given_up(path, db, monkeypatch):
    db.write(lambda connection: connection.execute("PRAGMA busy_timeout = 1").fetchall())
    db.flush(FLUSH_S)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        add(db, "ann")
        assert db.flush(FLUSH_S)
        assert names(db) == []
        assert db.failed == 1
    add(db, "bob")
    assert db.flush(FLUSH_S)
    assert names(db) == ["bob"]


def test_no_usable_file_means_memory(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    places = [tmp_path / "file" / "state.sqlite3", tmp_path]  # below a file; a folder
    for place in places:
        with contextlib.closing(StateDb.open(place)) as db:
            assert db.in_memory
            add(db, "ann")
            assert db.flush(FLUSH_S)
            assert names(db) == ["ann"]
            assert db.erase(lambda connection: connection.execute("DELETE FROM findings").rowcount) == 1
    assert len(caplog.records) == len(places)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with contextlib.closing(StateDb.open(tmp_path / "state.sqlite3")) as db:
            assert db.in_memory
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("reason", ["database or disk is full", "attempt to write a readonly database"])
def test_a_disk_that_takes_no_schema_means_memory(path, monkeypatch, reason):
    def refuse(_path: Path) -> None:
        raise sqlite3.OperationalError(reason)

    monkeypatch.setattr(state_file, "_connect", refuse)
    with contextlib.closing(StateDb.open(path)) as db:
        assert db.in_memory


def test_a_file_of_another_version_is_emptied(path, db):
    add(db, "ann")
    db.close()
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE unknown (x)")
        other.execute("PRAGMA user_version = 99")
    with contextlib.closing(StateDb.open(path)) as again:
        assert not again.in_memory
        assert names(again) == []
        assert again.read("SELECT name FROM sqlite_master WHERE name = 'unknown'") == []


@pytest.mark.parametrize("content", [b"", b"x", b"not a database at all" * 1000, bytes(100_000)])
def test_something_else_in_its_place_is_replaced(path, content):
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with contextlib.closing(StateDb.open(path)) as db:
        assert not db.in_memory
        add(db, "ann")
        assert db.flush(FLUSH_S)
        assert names(db) == ["ann"]


@pytest.mark.parametrize(
    "damage",
    [
        "ALTER TABLE findings RENAME COLUMN excerpt TO exzerpt",
        "DROP INDEX responses_by_use",
        "UPDATE generation SET value = 'x'",
        "INSERT INTO generation VALUES (1)",
    ],
)
def test_tables_that_are_not_ours_are_replaced(path, db, damage):
    add(db, "ann")
    db.close()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute(damage)
    with contextlib.closing(StateDb.open(path)) as again:
        assert not again.in_memory
        add(again, "bob")
        assert again.flush(FLUSH_S)
        assert "bob" in (names(again) or ())


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_survived(tmp_path, data):
    path = tmp_path / "state.sqlite3"
    for file in state_files(path):
        file.unlink(missing_ok=True)
    db = StateDb.open(path)
    for index in range(200):
        add(db, f"user {index}")
    db.close()
    whole = bytearray(path.read_bytes())
    if data.draw(st.booleans(), label="truncate"):
        del whole[data.draw(st.integers(0, len(whole)), label="length") :]
    for position in data.draw(st.lists(st.integers(0, max(0, len(whole) - 1)), max_size=20), label="flips"):
        if whole:
            whole[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(whole)
    with contextlib.closing(StateDb.open(path)) as db:
        assert not db.in_memory
        names(db)
        for _ in range(2):  # damage that shows only at a write is repaired before the next
            add(db, "ann")
            assert db.flush(FLUSH_S)
        assert "ann" in (names(db) or ())


def test_damage_while_it_runs_is_repaired(path, db):
    for index in range(2000):
        add(db, f"user {index}" + "x" * 50)
        if index % 500 == 0:
            db.flush(FLUSH_S)
    db.erase(lambda _: 0)  # moves everything out of the log of changes, into the file
    size = path.stat().st_size
    with path.open("r+b") as stream:
        stream.seek(4096)
        stream.write(b"\xff" * (size - 4096))
    # A reader's cached pages are good for as long as nothing changes, so damage may show late: write until it has.
    for _ in range(5):
        add(db, "ann")
        assert db.flush(FLUSH_S)
        names(db)
    assert not db.in_memory
    assert names(db) == ["ann"]


def test_an_erasure_changes_the_generation_and_leaves_no_words(path, db):
    add(db, "a very private word")
    db.flush(FLUSH_S)
    before = db.generation()
    assert db.erase(lambda connection: connection.execute("DELETE FROM findings").rowcount) == 1
    assert db.generation() != before
    for file in state_files(path):
        assert not file.exists() or b"very private" not in file.read_bytes()


def test_an_erasure_that_fails_says_so(path, db):
    db.write(lambda connection: connection.execute("PRAGMA busy_timeout = 1").fetchall())
    db.flush(FLUSH_S)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert db.erase(lambda _: 1) is None


def test_what_was_queued_before_another_process_erased_is_not_written(path, db):
    block = Block(db)
    block.free()
    db.flush(FLUSH_S)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        other.execute("UPDATE generation SET value = value + 1")
        add(db, "erased")
        other.execute("COMMIT")
    db.flush(FLUSH_S)
    assert names(db) == []
    add(db, "new")
    db.flush(FLUSH_S)
    assert names(db) == ["new"]


def test_two_processes_write_one_file(path, db):
    code = (
        "import sys; from pathlib import Path; from tests.cache.test_state_db import *\n"
        "db = StateDb.open(Path(sys.argv[1]))\n"
        "for index in range(300): add(db, f'{sys.argv[2]} {index}'); index % 7 or db.flush(10)\n"
        "db.close()"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(path), name]) for name in ("one", "two")]
    for index in range(300):
        add(db, f"here {index}")
    for process in processes:
        assert process.wait(60) == 0
    db.flush(FLUSH_S)
    assert len(names(db) or ()) == 900


def test_processes_that_meet_a_damaged_file_together_repair_it_once(path):
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not a database" * 1000)
    opened: list[StateDb] = []
    barrier = threading.Barrier(4)

    def open_and_write(name: str) -> None:
        barrier.wait(FLUSH_S)
        db = StateDb.open(path)
        add(db, name)
        opened.append(db)

    threads = [threading.Thread(target=open_and_write, args=(str(index),)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for db in opened:
        db.close()
    with contextlib.closing(StateDb.open(path)) as db:
        assert names(db) == ["0", "1", "2", "3"]


def test_many_threads_read_while_one_writes(db):
    errors: list[object] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            if names(db) is None:
                errors.append("a read failed")

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for index in range(50):
        add(db, str(index))
        assert db.flush(FLUSH_S)
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors
