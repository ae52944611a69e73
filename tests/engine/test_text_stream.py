from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_llm.engine.text_stream import TextStream
from tests.fakes import STOP_ID, byte_tokenizer

TOKENIZER = byte_tokenizer()


def stream(text: str, stop: tuple[str, ...] = (), step: int = 1) -> tuple[list[str], TextStream]:
    text_stream = TextStream(TOKENIZER, stop)
    token_ids = list(text.encode())
    pieces = [text_stream.push(token_ids[at : at + step]) for at in range(0, len(token_ids), step)]
    return [*pieces, text_stream.finish()], text_stream


@given(st.text(max_size=60).filter(lambda text: "\ufffd" not in text), st.integers(1, 5))
def test_pieces_join_to_the_text_and_hold_whole_characters(text, step):
    pieces, text_stream = stream(text, step=step)
    assert "".join(pieces) == text == text_stream.text
    assert all("\ufffd" not in piece for piece in pieces)


def test_pieces_that_never_end_at_an_edge_lose_nothing():
    text = "0" + "\U00010000" * 40
    pieces, _ = stream(text, step=2)
    assert "".join(pieces) == text


def test_a_character_of_many_tokens_comes_in_one_piece():
    pieces, _ = stream("a你🙂")
    assert [piece for piece in pieces if piece] == ["a", "你", "🙂"]


def test_an_incomplete_last_character_is_left_out():
    text_stream = TextStream(TOKENIZER)
    released = text_stream.push(list("ok 你".encode()[:-1])) + text_stream.finish()
    assert released == text_stream.text == "ok "


def test_bytes_that_are_no_character_do_not_hold_up_the_rest():
    text_stream = TextStream(TOKENIZER)
    released = "".join(text_stream.push([token_id]) for token_id in [0xFF] * 20 + list(b"on"))
    assert released.endswith("on")


def test_special_tokens_have_no_text():
    text_stream = TextStream(TOKENIZER)
    assert text_stream.push([ord("a"), STOP_ID, ord("b")]) == "ab"


@given(
    st.text("abX", max_size=20),
    st.lists(st.text("abX", min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(1, 4),
)
def test_stop_strings_cut_where_the_first_one_begins(text, stops, step):
    pieces, text_stream = stream(text, tuple(stops), step)
    # What matters is the first stop string to be complete in the stream.
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    if not ends:
        assert text_stream.text == text
        assert not text_stream.stopped
    else:
        assert text_stream.stopped
        assert text_stream.text in {text[:start] for _, start in ends}
        assert len(text_stream.text) <= max(start for _, start in ends)
    assert "".join(pieces) == text_stream.text
    assert not any(stop in text_stream.text for stop in stops)


def test_text_that_may_become_a_stop_string_is_held_back():
    text_stream = TextStream(TOKENIZER, ("END.",))
    assert text_stream.push(list(b"see EN")) == "see "
    assert text_stream.push(list(b"D")) == ""
    assert text_stream.push(list(b"!")) == "END!"


@pytest.mark.parametrize("text", ["END.", "x END. y"])
def test_nothing_follows_a_stop(text):
    pieces, text_stream = stream(text, ("END.",))
    assert "END" not in "".join(pieces)
    assert text_stream.push(list(b"more")) == ""
