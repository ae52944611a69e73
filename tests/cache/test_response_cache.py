"""Answers that are given again: to the same user, the same query, the same everything."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_llm.cache.response_cache import (
    ROW_OVERHEAD_BYTES,
    CachedResponse,
    ResponseCache,
    clear_responses,
    response_key,
    response_stats,
)
from edge_llm.cache.state_db import StateDb, state_path
from edge_llm.cache.state_file import open_memory

FLUSH_S = 10
ANSWER = CachedResponse("It is 80 km.", "stop", 12, 6)
MESSAGES = [("system", "You are a car."), ("user", "How far is it?")]
SETTINGS: dict[str, Any] = {"temperature": 0.0, "top_k": 0, "max_tokens": 64, "stop": ["\n"], "seed": None}


def make(db: StateDb, scope: str = "a" * 64, max_entries: int = 100, max_bytes: int = 1 << 20) -> ResponseCache:
    return ResponseCache(db, scope=scope, max_entries=max_entries, max_bytes=max_bytes)


def key(text: str = "How far is it?", **changes: Any) -> bytes:
    query = {"messages": [("user", text)], "settings": SETTINGS, "history": b""} | changes
    return response_key(**query)


def test_an_answer_is_found_at_once_and_after_it_was_written(db):
    cache = make(db)
    assert cache.find("ann", key()) is None
    cache.put("ann", key(), ANSWER)
    assert cache.find("ann", key()) == ANSWER
    assert db.flush(FLUSH_S)
    assert cache.find("ann", key()) == ANSWER
    assert cache.find("ann", key("  HOW far is it")) == ANSWER
    assert cache.entries == 1
    assert db.flush(FLUSH_S)
    assert response_stats(db).hits == 3


def test_asking_whether_there_is_an_answer_counts_nothing(db):
    cache = make(db, max_entries=2)
    cache.put("ann", b"a", ANSWER)
    cache.put("ann", b"b", ANSWER)
    assert cache.holds("ann", b"a")
    assert not cache.holds("bob", b"a")
    cache.put("ann", b"c", ANSWER)
    assert db.flush(FLUSH_S)
    assert not cache.holds("ann", b"a")
    assert response_stats(db).hits == 0


def test_kind_and_actions_are_kept_with_the_text(tmp_path, db):
    command = CachedResponse("Set to 21.", "stop", 12, 6, "command", b'[{"name":"climate.set"}]')
    make(db).put("ann", key(), command)
    db.close()
    with contextlib.closing(StateDb.open(state_path(tmp_path))) as again:
        assert make(again).find("ann", key()) == command


def test_an_answer_survives_a_restart(tmp_path, db):
    make(db).put("ann", key(), ANSWER)
    db.close()
    with contextlib.closing(StateDb.open(state_path(tmp_path))) as again:
        assert make(again).find("ann", key()) == ANSWER


@pytest.mark.parametrize("written", [False, True])
def test_nobody_gets_the_answer_of_another(db, written):
    cache = make(db)
    cache.put("ann", key(), ANSWER)
    if written:
        db.flush(FLUSH_S)
    assert cache.find("bob", key()) is None
    assert cache.find("ann", key()) == ANSWER


@pytest.mark.parametrize("written", [False, True])
def test_another_bundle_or_template_misses(db, written):
    cache = make(db)
    cache.put("ann", key(), ANSWER)
    if written:
        db.flush(FLUSH_S)
    assert make(db, scope="b" * 64).find("ann", key()) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"settings": SETTINGS | {"temperature": 0.7}},
        {"settings": SETTINGS | {"max_tokens": 65}},
        {"settings": SETTINGS | {"stop": []}},
        {"settings": SETTINGS | {"seed": 1}},
        {"settings": {name: value for name, value in SETTINGS.items() if name != "seed"}},
        {"history": b"a session"},
        {"messages": [("user", "How far was it?")]},
        {"messages": [("assistant", "How far is it?")]},
        {"messages": [("system", "Be brief."), ("user", "How far is it?")]},
        {"messages": []},
    ],
)
def test_what_changes_the_answer_changes_the_key(changes):
    assert key(**changes) != key()


def test_only_the_last_message_is_normalised():
    assert response_key(messages=MESSAGES, settings=SETTINGS, history=b"") == response_key(
        messages=[MESSAGES[0], ("user", " how FAR is it ")], settings=dict(reversed(SETTINGS.items())), history=b""
    )
    assert response_key(messages=MESSAGES, settings=SETTINGS, history=b"") != response_key(
        messages=[("system", "you are a car."), MESSAGES[1]], settings=SETTINGS, history=b""
    )
    assert key("?") != key("!")
    assert len(key()) == 32


def test_a_setting_that_json_cannot_hold_is_an_error():
    with pytest.raises(TypeError):
        key(settings={"stop": b""})
    with pytest.raises(ValueError, match="JSON compliant"):
        key(settings={"temperature": float("nan")})


PARTS = st.lists(st.tuples(st.text(max_size=4), st.text(alphabet='ab",[]\\ ', min_size=1, max_size=4)), max_size=3)


@given(PARTS, PARTS, st.binary(max_size=2), st.binary(max_size=2))
def test_keys_are_unambiguous(first, second, history_a, history_b):
    def exact(messages: list[tuple[str, str]]) -> list[tuple[str, str]]:
        return [*messages, ("user", "x")]  # so that nothing that differs is normalised

    a = response_key(messages=exact(first), settings={}, history=history_a)
    b = response_key(messages=exact(second), settings={}, history=history_b)
    assert (a == b) == ((first, history_a) == (second, history_b))


def test_the_least_recently_used_goes_first(db):
    cache = make(db, max_entries=3)
    for name in "abc":
        cache.put("ann", name.encode(), ANSWER)
    db.flush(FLUSH_S)
    assert cache.find("ann", b"a") is not None
    cache.put("bob", b"d", ANSWER)
    db.flush(FLUSH_S)
    assert cache.find("ann", b"b") is None
    assert all(cache.find(user, name) for user, name in (("ann", b"a"), ("ann", b"c"), ("bob", b"d")))


def test_rows_of_another_scope_count_and_go_first(db):
    old = make(db, scope="old", max_entries=3)
    for name in "abc":
        old.put("ann", name.encode(), ANSWER)
    new = make(db, scope="new", max_entries=3)
    new.put("ann", b"d", ANSWER)
    db.flush(FLUSH_S)
    assert new.entries == 3
    assert new.find("ann", b"d") is not None
    assert old.find("ann", b"a") is None


def test_smaller_bounds_hold_after_a_restart(db):
    cache = make(db)
    for index in range(20):
        cache.put("ann", bytes([index]), ANSWER)
    db.flush(FLUSH_S)
    cache = make(db, max_entries=5)
    db.flush(FLUSH_S)
    assert cache.entries == 5
    assert cache.find("ann", bytes([19])) is not None


def test_an_answer_larger_than_the_bound_is_not_kept(db):
    cache = make(db, max_bytes=4096)
    cache.put("ann", b"small", ANSWER)
    cache.put("ann", b"large", CachedResponse("x" * 4096, "length", 1, 1))
    assert cache.find("ann", b"large") is None
    db.flush(FLUSH_S)
    assert (cache.entries, cache.find("ann", b"small")) == (1, ANSWER)


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.integers(0, 9), st.integers(0, 900), st.booleans()), min_size=1, max_size=40
    )
)
def test_bounds_hold_and_what_is_found_is_the_latest(steps):
    db = StateDb(None, open_memory())
    cache = make(db, max_entries=6, max_bytes=4096)
    latest: dict[tuple[str, int], CachedResponse] = {}
    for user, number, length, written in steps:
        response = CachedResponse("é" * (length // 2), "stop", length, number)
        cache.put(user, bytes([number]), response)
        latest[user, number] = response
        assert cache.find(user, bytes([number])) == response
        if written:
            assert db.flush(FLUSH_S)
            assert cache.find(user, bytes([number])) == response
            assert cache.entries <= 6
            assert cache.nbytes <= 4096
    for (user, number), response in latest.items():
        assert cache.find(user, bytes([number])) in (None, response)
    db.flush(FLUSH_S)
    rows = db.read("SELECT user, scope, key, body, nbytes FROM responses") or []
    accounted = [sum(map(len, row[:4])) + ROW_OVERHEAD_BYTES for row in rows]
    assert accounted == [row[4] for row in rows]
    db.close()


def test_a_row_that_was_damaged_is_a_miss_and_goes(db):
    cache = make(db)
    cache.put("ann", key(), ANSWER)
    db.write(
        lambda connection: connection.execute(
            "UPDATE responses SET body = CAST(replace(body, CAST('80' AS BLOB), CAST('90' AS BLOB)) AS BLOB)"
        )
    )
    db.flush(FLUSH_S)
    assert cache.find("ann", key()) is None
    db.flush(FLUSH_S)
    assert cache.entries == 0


@pytest.mark.parametrize("nbytes", [2**63 - 1, "many"])
def test_a_damaged_size_does_not_stop_the_writing(db, nbytes):
    cache = make(db)
    for text in ("one", "two"):
        cache.put("ann", key(text), ANSWER)
    db.write(lambda connection: connection.execute("UPDATE responses SET nbytes = ?", (nbytes,)))
    cache.put("ann", key("three"), ANSWER)
    assert db.flush(FLUSH_S)
    assert cache.find("ann", key("three")) == ANSWER
    assert db.failed == 0


@pytest.mark.parametrize("column", ["user", "key"])
def test_a_row_in_the_wrong_place_is_a_miss(db, column):
    cache = make(db)
    cache.put("ann", key(), ANSWER)
    other: Any = "bob" if column == "user" else b"other"
    db.write(lambda connection: connection.execute(f"UPDATE responses SET {column} = ?", (other,)))
    db.flush(FLUSH_S)
    assert cache.find("bob", key()) is None
    assert cache.find("ann", b"other") is None


def test_a_full_disk_is_a_miss_and_nothing_worse(db):
    cache = make(db)
    db.flush(FLUSH_S)
    db.write(lambda connection: connection.execute("PRAGMA max_page_count = 1").fetchall())
    db.flush(FLUSH_S)
    long = CachedResponse("x" * 100_000, "length", 1, 1)
    cache.put("ann", key(), long)
    db.flush(FLUSH_S)
    assert cache.find("ann", key()) is None
    db.write(lambda connection: connection.execute("PRAGMA max_page_count = 100000").fetchall())
    cache.put("ann", key(), long)
    db.flush(FLUSH_S)
    assert cache.find("ann", key()) == long


def test_a_dropped_write_is_a_miss(db):
    cache = make(db)
    db.close()
    cache.put("ann", key(), ANSWER)
    assert cache.find("ann", key()) is None


def test_words_that_are_no_text_are_not_kept(db):
    cache = make(db)
    cache.put("ann", key("\ud800"), CachedResponse("\ud800", "stop", 1, 1))
    assert cache.find("ann", key("\ud800")) is None


def test_clearing_one_user_and_everybody(db):
    cache, other_scope = make(db), make(db, scope="other")
    for user in ("ann", "bob"):
        cache.put(user, key(), ANSWER)
        other_scope.put(user, key(), ANSWER)
    assert cache.clear("ann") == 2
    assert cache.find("ann", key()) is None
    assert other_scope.find("ann", key()) is None
    assert cache.find("bob", key()) == ANSWER
    cache.put("ann", key(), ANSWER)
    assert cache.clear() == 3
    assert cache.find("ann", key()) is None
    assert (cache.entries, cache.nbytes) == (0, 0)


def test_an_erasure_by_another_process_reaches_what_waits_for_the_disk(tmp_path, db):
    cache = make(db)
    db.flush(FLUSH_S)
    free, entered = threading.Event(), threading.Event()
    db.write(lambda _: entered.set(), lambda: free.wait(FLUSH_S) and None)  # after the commit, so nothing is locked
    threading.Thread(target=db.flush, args=(FLUSH_S,)).start()
    assert entered.wait(FLUSH_S)
    cache.put("ann", key(), ANSWER)
    assert cache.find("ann", key()) == ANSWER
    with contextlib.closing(StateDb.open(state_path(tmp_path))) as other:
        assert clear_responses(other, "ann") == 0
    assert cache.find("ann", key()) is None
    free.set()
    assert db.flush(FLUSH_S)
    assert cache.entries == 0


def test_two_processes_share_a_file(tmp_path, db):
    code = (
        "import sys; from pathlib import Path; from tests.cache.test_response_cache import *\n"
        "db = StateDb.open(state_path(Path(sys.argv[1])))\n"
        "cache = make(db, max_entries=50)\n"
        "for index in range(100): cache.put(sys.argv[2], bytes([index]), ANSWER); index % 9 or db.flush(10)\n"
        "assert cache.find(sys.argv[2], bytes([99])) == ANSWER\n"
        "db.close()"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name]) for name in ("one", "two")]
    assert [process.wait(60) for process in processes] == [0, 0]
    cache = make(db, max_entries=50)
    assert cache.entries == 50
    assert cache.find("two", bytes([99])) == ANSWER or cache.find("one", bytes([99])) == ANSWER


def test_a_damaged_file_is_only_a_miss(tmp_path, db):
    make(db).put("ann", key(), ANSWER)
    db.close()
    path = state_path(tmp_path)
    path.write_bytes(b"x" * path.stat().st_size)
    with contextlib.closing(StateDb.open(path)) as again:
        cache = make(again)
        assert cache.find("ann", key()) is None
        cache.put("ann", key(), ANSWER)
        again.flush(FLUSH_S)
        assert cache.find("ann", key()) == ANSWER


def test_no_words_of_the_query_are_stored(tmp_path, db):
    make(db).put("ann", key("a rare question"), ANSWER)
    db.close()
    with contextlib.closing(sqlite3.connect(state_path(tmp_path))) as raw:
        assert "rare" not in "".join(raw.iterdump())
