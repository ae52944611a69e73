from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_llm.engine.prompt import Message
from edge_llm.errors import RequestError
from edge_llm.serving.sessions import SessionStore
from tests.fakes import byte_tokenizer, renderer

RENDERER = renderer(byte_tokenizer())
USER, BOT = (lambda text: Message("user", text)), (lambda text: Message("assistant", text))


def store(max_tokens: int = 1000, idle_s: float = 60, max_sessions: int = 10) -> SessionStore:
    return SessionStore(RENDERER, max_tokens=max_tokens, idle_s=idle_s, max_sessions=max_sessions)


def test_turns_come_back_in_order():
    sessions = store()
    sessions.add_turn("u", "s", USER("one"), BOT("uno"), now=0)
    sessions.add_turn("u", "s", USER("two"), BOT("due"), now=1)
    expected = RENDERER.encode([USER("one"), BOT("uno"), USER("two"), BOT("due"), USER("three")])
    assert sessions.prompt("u", "s", [USER("three")], 500, now=2) == expected


def test_sessions_are_separate_by_user_and_name():
    sessions = store()
    sessions.add_turn("u", "s", USER("one"), BOT("uno"), now=0)
    alone = RENDERER.encode([USER("hi")])
    assert sessions.prompt("other", "s", [USER("hi")], 500, now=0) == alone
    assert sessions.prompt("u", "other", [USER("hi")], 500, now=0) == alone


@given(st.integers(10, 120), st.lists(st.text("ab", max_size=8), max_size=8))
def test_a_prompt_fits_and_is_one_the_template_would_render(room, texts):
    sessions = store()
    turns = [(USER(text), BOT(text.upper())) for text in texts]
    for question, answer in turns:
        sessions.add_turn("u", "s", question, answer, now=0)
    new = [USER("new")]
    possible = [
        RENDERER.encode([*(m for turn in turns[start:] for m in turn), *new]) for start in range(len(turns) + 1)
    ]
    fitting = [token_ids for token_ids in possible if len(token_ids) <= room]
    if not fitting:
        with pytest.raises(RequestError) as caught:
            sessions.prompt("u", "s", new, room, now=0)
        assert caught.value.code == 413
    else:
        assert sessions.prompt("u", "s", new, room, now=0) == fitting[0]


def test_kept_turns_are_bounded_and_the_oldest_go_first():
    sessions = store(max_tokens=60)
    for number in range(10):
        sessions.add_turn("u", "s", USER(f"question {number}"), BOT("x"), now=0)
    prompt = bytes(token for token in sessions.prompt("u", "s", [USER("?")], 1000, now=0) if token < 256).decode()
    assert "question 9" in prompt
    assert "question 0" not in prompt


def test_an_idle_session_is_forgotten():
    sessions = store(idle_s=10)
    sessions.add_turn("u", "s", USER("one"), BOT("uno"), now=0)
    sessions.add_turn("u", "t", USER("one"), BOT("uno"), now=5)
    sessions.expire(now=10)
    assert len(sessions) == 1
    assert sessions.prompt("u", "s", [USER("hi")], 500, now=10) == RENDERER.encode([USER("hi")])


def test_a_long_text_is_refused_without_rendering_the_history():
    rendered = []

    class Counting:
        def encode(self, messages):
            rendered.append(len(messages))
            return RENDERER.encode(messages)

    sessions = SessionStore(Counting(), max_tokens=10_000, idle_s=60, max_sessions=10)
    for number in range(50):
        sessions.add_turn("u", "s", USER(f"q{number}"), BOT("a"), now=0)
    rendered.clear()
    with pytest.raises(RequestError, match="shorten the text"):
        sessions.prompt("u", "s", [USER("x" * 5000)], 500, now=0)
    assert rendered == [1]
    sessions.prompt("u", "s", [USER("x" * 300)], 500, now=0)
    assert len(rendered) <= 3


def test_one_user_cannot_push_out_anothers_sessions():
    sessions = store(max_sessions=4)
    sessions.add_turn("quiet", "s", USER("q"), BOT("a"), now=0)
    for number in range(20):
        sessions.add_turn("loud", f"s{number}", USER("q"), BOT("a"), now=1)
    assert len(sessions) == 4
    assert len(sessions.prompt("quiet", "s", [USER("q")], 500, now=2)) > len(RENDERER.encode([USER("q")]))


def test_the_number_of_sessions_is_bounded_and_use_keeps_one():
    sessions = store(max_sessions=2)
    for name in ("a", "b"):
        sessions.add_turn("u", name, USER("q"), BOT("a"), now=0)
    sessions.add_turn("u", "a", USER("q"), BOT("a"), now=1)
    sessions.add_turn("u", "c", USER("q"), BOT("a"), now=2)
    assert len(sessions) == 2
    assert len(sessions.prompt("u", "a", [USER("q")], 500, now=2)) > len(RENDERER.encode([USER("q")]))
    assert sessions.prompt("u", "b", [USER("q")], 500, now=2) == RENDERER.encode([USER("q")])
