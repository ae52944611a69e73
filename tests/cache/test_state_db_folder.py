"""The state file's folder is deleted, replaced or closed while it is open: it goes on in memory, and comes back."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_llm.cache import state_db
from edge_llm.cache.response_cache import CachedResponse, ResponseCache
from edge_llm.cache.state_db import ErasureWatch, StateDb, state_path
from tests.brokers import wait_for
from tests.cache.test_state_db import FLUSH_S, INSERT, add, names

DELETED = "the state file was deleted or replaced, and is opened anew"
UNUSABLE = "the state file cannot be used: answers and popular queries are kept in memory only, until it can"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def db(folder: Path) -> Iterator[StateDb]:
    with contextlib.closing(StateDb.open(state_path(folder))) as opened:
        add(opened, "before")
        assert opened.flush(FLUSH_S)
        yield opened


@pytest.fixture
def _retry_at_once(monkeypatch):
    monkeypatch.setattr(state_db, "_RETRY_INTERVAL_S", 0.0)


def in_file(folder: Path) -> list[str]:
    """What another process finds."""
    with contextlib.closing(sqlite3.connect(state_path(folder))) as other:
        assert other.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return [name for (name,) in other.execute("SELECT user FROM findings ORDER BY user")]


def messages(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_a_deleted_folder_is_made_anew_and_what_it_held_is_forgotten(folder, db, caplog):
    watch = ErasureWatch(db)
    shutil.rmtree(folder)
    add(db, "queued before it was noticed")
    assert db.flush(FLUSH_S)
    assert watch.erased()
    assert names(db) == []
    add(db, "after")
    assert db.flush(FLUSH_S)
    assert names(db) == in_file(folder) == ["after"]
    assert not db.in_memory
    assert messages(caplog) == [DELETED]


def test_it_is_noticed_while_nothing_is_written(folder, monkeypatch, caplog):
    monkeypatch.setattr(state_db, "_LOOK_INTERVAL_S", 0.01)
    with contextlib.closing(StateDb.open(state_path(folder))) as db:
        add(db, "before")
        assert db.flush(FLUSH_S)
        shutil.rmtree(folder)
        wait_for(lambda: DELETED in messages(caplog), FLUSH_S)
        assert names(db) == in_file(folder) == []


def test_a_file_that_another_process_has_made_meanwhile_is_shared(folder, db, caplog):
    for file in folder.iterdir():
        file.unlink()
    with contextlib.closing(StateDb.open(state_path(folder))) as other:
        add(other, "by the other")
        assert other.flush(FLUSH_S)
        # Its log of changes lies where the deleted file's was: that one is closed without touching it.
        db.flush(FLUSH_S)
        for name in ("first", "second"):
            add(db, name)
            assert db.flush(FLUSH_S)
            add(other, f"{name} of the other")
            assert other.flush(FLUSH_S)
        expected = ["by the other", "first of the other", "second", "second of the other"]
        assert names(db) == names(other) == in_file(folder) == expected
    assert messages(caplog) == [DELETED]


@pytest.mark.usefixtures("_retry_at_once")
def test_a_folder_that_cannot_be_made_again_means_memory_until_it_can(folder, db, caplog):
    shutil.rmtree(folder)
    folder.write_text("a file where the folder was")
    for name in ("forgotten", "ann", "bob"):
        add(db, name)
        assert db.flush(FLUSH_S)
        assert db.in_memory
    assert names(db) == ["ann", "bob"]
    assert db.erase(lambda connection: connection.execute("DELETE FROM findings WHERE user = 'ann'").rowcount) == 1
    assert messages(caplog) == [UNUSABLE], "tried again each time, and said once"
    folder.unlink()
    add(db, "queued before it was noticed")
    assert db.flush(FLUSH_S)
    add(db, "after")
    assert db.flush(FLUSH_S)
    assert not db.in_memory
    assert names(db) == in_file(folder) == ["after"]
    assert messages(caplog) == [UNUSABLE]
    assert db.failed == 0


@pytest.mark.usefixtures("_retry_at_once")
def test_a_file_that_could_not_be_opened_at_first_is_used_once_it_can(folder, caplog):
    folder.write_text("a file where the folder should be")
    with contextlib.closing(StateDb.open(state_path(folder))) as db:
        watch = ErasureWatch(db)
        add(db, "ann")
        assert db.flush(FLUSH_S)
        assert db.in_memory
        folder.unlink()
        add(db, "bob")
        assert db.flush(FLUSH_S)
        assert not db.in_memory
        assert watch.erased(), "mirrors of what was in memory are forgotten"
        add(db, "cid")
        assert db.flush(FLUSH_S)
        assert in_file(folder) == ["cid"]
    assert messages(caplog) == [UNUSABLE]


def test_a_file_that_cannot_be_used_is_not_tried_at_every_write(folder, monkeypatch):
    tries = []
    folder.write_text("a file where the folder should be")
    with contextlib.closing(StateDb.open(state_path(folder))) as db:
        monkeypatch.setattr(state_db, "open_file", tries.append)
        for index in range(20):
            add(db, str(index))
            assert db.flush(FLUSH_S)
        assert tries == []


def test_an_answer_of_the_deleted_file_is_not_found_again(folder, db):
    cache = ResponseCache(db, scope="00", max_entries=10, max_bytes=1 << 20)
    answer = CachedResponse("an answer", "stop", 1, 1)
    cache.put("ann", b"key", answer)
    assert db.flush(FLUSH_S)
    assert cache.find("ann", b"key") == answer
    shutil.rmtree(folder)
    db.flush(0.0)
    db.write(lambda _: None)
    assert db.flush(FLUSH_S)
    assert cache.find("ann", b"key") is None
    cache.put("ann", b"key", answer)
    assert db.flush(FLUSH_S)
    assert cache.find("ann", b"key") == answer


def test_a_disk_that_stays_full_is_one_line_and_the_next_time_is_news(db, monkeypatch, caplog):
    monkeypatch.setattr(state_db, "_LOG_INTERVAL_S", 0.0)

    def limit(pages: int) -> None:
        assert db.write(lambda connection: connection.execute(f"PRAGMA max_page_count = {pages}").fetchall())
        assert db.flush(FLUSH_S)

    for round_number in (1, 2):
        limit(1)  # SQLite takes the present size instead
        for _ in range(3):
            db.write(lambda connection: connection.execute(INSERT, ("x" * 100_000,)))
            assert db.flush(FLUSH_S)
        assert messages(caplog) == ["could not write to the state file"] * round_number
        limit(1_000_000)
