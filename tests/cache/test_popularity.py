"""What a user asks often, and what that says about the next question."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_llm.cache import popularity as popularity_module
from edge_llm.cache.normalise import normalise
from edge_llm.cache.popularity import HALF_LIFE_S, Popularity, clear_popular, popular_counts
from edge_llm.cache.state_db import StateDb, state_path
from edge_llm.cache.state_file import open_memory
from tests.cache.conftest import Clock

FLUSH_S = 10
DAY_S = 86_400.0


def ask(popularity: Popularity, user: str, text: str, times: int = 1) -> None:
    for _ in range(times):
        popularity.record(user, text)


def test_a_prediction_is_the_likeliest_query_that_begins_so(db, clock):
    popularity = Popularity(db, clock=clock)
    ask(popularity, "ann", "What is the range?", 3)
    ask(popularity, "ann", "What is the time?")
    prediction = popularity.predict("ann", "what is")
    assert prediction is not None
    assert (prediction.text, prediction.confidence) == ("What is the range?", pytest.approx(0.75))
    prediction = popularity.predict("ann", " What is the RA")  # an unfinished word
    assert prediction is not None
    assert prediction.confidence == pytest.approx(1.0)
    assert popularity.predict("ann", "what is the t") is None  # asked only once
    assert popularity.predict("ann", "is the range") is None
    assert popularity.predict("ann", "what is the range today") is None
    assert popularity.predict("ann", "") is None
    assert popularity.predict("ann", "…") is None


def test_a_whole_query_predicts_itself(db, clock):
    popularity = Popularity(db, clock=clock)
    ask(popularity, "ann", "Lights on", 2)
    ask(popularity, "ann", "Lights on in the back", 2)
    prediction = popularity.predict("ann", "lights on!")
    assert prediction is not None
    assert prediction.confidence == pytest.approx(0.5)


def test_the_latest_spelling_is_kept(db, clock):
    popularity = Popularity(db, clock=clock)
    ask(popularity, "ann", "how far")
    ask(popularity, "ann", "How far?")
    assert popularity.known("ann", "HOW  FAR") == "How far?"
    assert popularity.top("ann", 5) == ["How far?"]
    assert popularity.known("ann", "how") is None


def test_old_queries_count_less_and_then_nothing(db, clock):
    popularity = Popularity(db, clock=clock)
    ask(popularity, "ann", "Old one?", 3)
    clock.now += HALF_LIFE_S
    assert popularity.predict("ann", "old") is not None  # 1.5
    clock.now += DAY_S
    assert popularity.predict("ann", "old") is None
    ask(popularity, "ann", "Old two?", 2)
    assert popularity.top("ann", 1) == ["Old two?"]
    prediction = popularity.predict("ann", "old")
    assert prediction is not None
    old = 3 * 0.5 ** (1 + 1 / 7)
    assert prediction.confidence == pytest.approx(2 / (2 + old))


def test_a_clock_that_jumps_back_decays_nothing(db, clock):
    popularity = Popularity(db, clock=clock)
    ask(popularity, "ann", "How far?", 2)
    clock.now = 0.0
    assert popularity.predict("ann", "how") is not None
    ask(popularity, "ann", "How far?")
    clock.now = HALF_LIFE_S
    assert popularity.predict("ann", "how") is not None  # 3 halved: the date it began with is not to be waited for
    clock.now = 1e15
    assert popularity.predict("ann", "how") is None


def test_users_are_kept_apart(db, clock):
    popularity = Popularity(db, clock=clock)
    ask(popularity, "ann", "Secret of Ann", 5)
    ask(popularity, "bob", "Lunch of Bob", 5)
    assert popularity.predict("ann", "secret") is not None
    assert popularity.predict("bob", "secret") is None
    assert popularity.known("bob", "Secret of Ann") is None
    assert popularity.top("bob", 9) == ["Lunch of Bob"]


def test_it_survives_a_restart(tmp_path, db, clock):
    popularity = Popularity(db, clock=clock)
    ask(popularity, "ann", "How far?", 3)
    ask(popularity, "ann", "How long?", 1)
    before = popularity.predict("ann", "how")
    db.close()
    with contextlib.closing(StateDb.open(state_path(tmp_path))) as again:
        popularity = Popularity(again, clock=clock)
        assert popularity.predict("ann", "how") == before
        assert popularity.top("ann", 2) == ["How far?", "How long?"]
        assert popularity.users() == ["ann"]


def test_two_processes_count_together(tmp_path, db, clock):
    with contextlib.closing(StateDb.open(state_path(tmp_path))) as other:
        ask(Popularity(db, clock=clock), "ann", "How far?")
        ask(Popularity(other, clock=clock), "ann", "How far?")
        db.flush(FLUSH_S)
        other.flush(FLUSH_S)
        assert Popularity(db, clock=clock).predict("ann", "how") is not None


def test_the_most_recently_active_user_comes_first(db, clock):
    popularity = Popularity(db, clock=clock)
    for user in ("ann", "bob", "eve", "ann"):
        ask(popularity, user, "Hello")
        clock.now += 1
    assert popularity.users() == ["ann", "eve", "bob"]
    db.flush(FLUSH_S)
    assert popularity.users() == ["ann", "eve", "bob"]
    assert Popularity(db, clock=clock).users() == ["ann", "eve", "bob"]
    assert popular_counts(db) == {"ann": 1, "bob": 1, "eve": 1}


@pytest.mark.parametrize("text", ["", " ", "?!", "x" * 301, "half a character \ud800"])
def test_what_is_not_remembered(db, clock, text):
    popularity = Popularity(db, clock=clock)
    ask(popularity, "ann", text, 3)
    db.flush(FLUSH_S)
    assert popularity.users() == []
    assert popular_counts(db) == {}


def test_a_newcomer_displaces_the_weakest(db, clock):
    popularity = Popularity(db, max_queries_per_user=3, clock=clock)
    ask(popularity, "ann", "a", 4)
    ask(popularity, "ann", "b", 2)
    ask(popularity, "ann", "c", 3)
    ask(popularity, "ann", "d")
    assert popularity.top("ann", 9) == ["a", "c", "d"]
    db.flush(FLUSH_S)
    assert Popularity(db, clock=clock).top("ann", 9) == ["a", "c", "d"]
    ask(popularity, "ann", "e")
    assert popularity.top("ann", 9) == ["a", "c", "e"]


def test_the_bound_over_all_users(db, clock):
    popularity = Popularity(db, max_queries=5, clock=clock)
    ask(popularity, "ann", "kept", 3)
    for user in "abcdefgh":
        clock.now += 1
        ask(popularity, user, "hello")
    db.flush(FLUSH_S)
    counts = popular_counts(db)
    assert sum(counts.values()) == 5
    assert counts["ann"] == 1
    assert counts["h"] == 1


def test_few_users_are_mirrored_and_none_is_forgotten(db, clock, monkeypatch):
    monkeypatch.setattr(popularity_module, "MAX_MIRRORED_USERS", 2)
    popularity = Popularity(db, clock=clock)
    for user in "abcd":
        ask(popularity, user, f"Hello {user}", 2)
        db.flush(FLUSH_S)
    for user in "abcd":
        assert popularity.known(user, f"hello {user}") == f"Hello {user}"
    assert len(popularity._mirrors) == 2


def test_clearing_one_user_and_everybody(db, clock):
    popularity = Popularity(db, clock=clock)
    for user in ("ann", "bob", "eve"):
        ask(popularity, user, "How far?", 2)
    assert popularity.clear("ann") == 1
    assert popularity.users() == ["bob", "eve"]
    assert popularity.predict("ann", "how") is None
    assert popularity.predict("bob", "how") is not None
    assert popularity.clear() == 2
    assert popularity.users() == []


def test_an_erasure_by_another_process_is_noticed(tmp_path, db, clock):
    popularity = Popularity(db, clock=clock)
    ask(popularity, "ann", "How far?", 2)
    ask(popularity, "bob", "How long?", 2)
    db.flush(FLUSH_S)
    with contextlib.closing(StateDb.open(state_path(tmp_path))) as other:
        assert clear_popular(other, "ann") == 1
    assert popularity.known("ann", "how far") is None
    assert popularity.predict("ann", "how") is None
    assert popularity.users() == ["bob"]
    assert popularity.known("bob", "how long") == "How long?"
    ask(popularity, "ann", "How far?")
    db.flush(FLUSH_S)
    assert popular_counts(db) == {"ann": 1, "bob": 1}


@pytest.mark.parametrize("damage", ["user = x'00ff'", "at = 'long ago'"])
def test_a_damaged_row_names_no_user(db, clock, damage):
    popularity = Popularity(db, clock=clock)
    for user in ("ann", "bob"):
        ask(popularity, user, "What is the range?")
    assert db.flush(FLUSH_S)
    assert db.write(lambda connection: connection.execute(f"UPDATE popular SET {damage} WHERE user = 'bob'"))
    assert db.flush(FLUSH_S)
    assert Popularity(db, clock=clock).users() == ["ann"]


def test_damaged_numbers_are_ignored(db, clock):
    popularity = Popularity(db, clock=clock)
    for text in ("a", "b", "c"):
        ask(popularity, "ann", text, 2)
    db.write(lambda connection: connection.execute("UPDATE popular SET log2_weight = 1e300 WHERE normal = 'a'"))
    db.write(lambda connection: connection.execute("UPDATE popular SET text = CAST(x'ff' AS TEXT) WHERE normal = 'b'"))
    db.flush(FLUSH_S)
    assert Popularity(db, clock=clock).top("ann", 9) == ["c", "\ufffd"]
    ask(popularity, "ann", "a")
    assert db.flush(FLUSH_S)
    assert Popularity(db, clock=clock).known("ann", "a") == "a"


WORDS = st.lists(st.sampled_from(["on", "off", "one", "the light", "é", "?"]), max_size=3).map(" ".join)


@given(
    st.lists(st.tuples(st.sampled_from("ab"), WORDS, st.floats(0, 20 * DAY_S)), max_size=30),
    WORDS,
    st.integers(1, 5),
)
def test_predictions_agree_with_counting(steps, partial, bound):
    clock = Clock()
    db = StateDb(None, open_memory())
    popularity = Popularity(db, max_queries_per_user=bound, clock=clock)
    asked: dict[str, dict[str, list[float]]] = {"a": {}, "b": {}}
    for user, text, later in steps:
        clock.now += later
        popularity.record(user, text)
        if normalise(text):
            asked[user].setdefault(normalise(text), []).append(clock.now)
    for user, queries in asked.items():
        top = popularity.top(user, 99)
        assert len(top) <= bound
        assert {normalise(text) for text in top} <= set(queries)
        if len(queries) > bound:
            continue
        weights = {
            text: sum(0.5 ** ((clock.now - at) / HALF_LIFE_S) for at in times) for text, times in queries.items()
        }
        ranked = [weights[normalise(text)] for text in top]
        assert ranked == sorted(ranked, reverse=True)
        prefix = normalise(partial)
        fitting = {text: weight for text, weight in weights.items() if prefix and text.startswith(prefix)}
        prediction = popularity.predict(user, partial)
        best = max(fitting.values(), default=0.0)
        if prediction is None:
            assert best < 1.5 + 1e-9
        else:
            assert fitting[normalise(prediction.text)] == pytest.approx(best)
            assert prediction.confidence == pytest.approx(best / sum(fitting.values()))
    # What the file holds predicts the same.
    assert db.flush(FLUSH_S)
    again = Popularity(db, max_queries_per_user=bound, clock=clock)
    for user in "ab":
        assert set(again.top(user, 99)) == set(popularity.top(user, 99))
    db.close()
