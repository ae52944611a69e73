"""What the host publishes for answers to use."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_llm.domain.state_values import MAX_PAYLOAD_BYTES, StateValues


def published(payload: bytes) -> StateValues:
    values = StateValues()
    assert values.update("x", payload)
    return values


@pytest.mark.parametrize(
    ("payload", "kind", "said"),
    [
        (b"312", "integer", "312"),
        (b" 312\n", "integer", "312"),
        (b"311.6", "integer", "312"),
        (b"-5", "integer", "-5"),
        (b"1234567", "integer", "1234567"),
        (b"2.5", "number", "2.5"),
        (b"20.0", "number", "20"),
        (b"21.3499999", "number", "21.35"),
        (b"1234567", "number", "1234567"),
        (b"1234567.8", "number", "1234568"),
        (b"999999.9", "number", "1000000"),
        (b"0.00001", "number", "0.00001"),
        (b"-0.0", "number", "0"),
        (b'"Main Street"', "text", "Main Street"),
        (b"Main Street", "text", "Main Street"),
        (b"  Main Street\r\n", "text", "Main Street"),
        (b"Main\nStreet", "text", "Main Street"),
        (b"Main\x1b[0m\x00Street", "text", "Main[0mStreet"),
        ("Århus 東京".encode(), "text", "Århus 東京"),
        (b"7", "text", "7"),
        (b"12345678901", "text", "12345678901"),
        (b"01711234567", "text", "01711234567"),
        (b"nan", "text", "nan"),
        (b"{not json", "text", "{not json"),
    ],
)
def test_a_value_is_said_as_people_say_it(payload, kind, said):
    assert published(payload).get("x", kind) == said


@pytest.mark.parametrize("payload", [b"far", b'"312"', b"nan", b"Infinity", b"1e999", b"0x10"])
@pytest.mark.parametrize("kind", ["integer", "number"])
def test_text_is_no_number(payload, kind):
    assert published(payload).get("x", kind) is None


@pytest.mark.parametrize(
    "payload", [b"\xff\xfe", b"true", b"null", b"[1]", b'{"value": 1}', b"x" * (MAX_PAYLOAD_BYTES + 1)]
)
def test_what_is_neither_number_nor_short_text_is_refused_and_the_old_value_stays(payload):
    values = published(b"1")
    assert not values.update("x", payload)
    assert values.get("x", "integer") == "1"


def test_the_longest_payload_is_taken():
    assert published(b"x" * MAX_PAYLOAD_BYTES).get("x", "text") == "x" * MAX_PAYLOAD_BYTES


@pytest.mark.parametrize("payload", [b"", b"  ", b"\n", b'""', b'"  "'])
def test_an_empty_payload_takes_the_value_back(payload):
    values = published(b"1")
    assert values.update("x", payload)
    assert values.get("x", "integer") is None
    assert values.update("never_seen", payload)


def test_the_latest_value_counts():
    values = published(b"1")
    assert values.update("x", b"2")
    assert values.get("x", "integer") == "2"
    assert values.get("y", "integer") is None


def test_names_are_bounded_and_known_ones_go_on():
    values = StateValues()
    assert all(values.update(f"n{number}", b"1") for number in range(256))
    assert not values.update("one_more", b"1")
    assert values.update("n7", b"2")
    assert values.get("n7", "integer") == "2"
    assert values.update("n8", b"")
    assert values.update("one_more", b"1")


@settings(deadline=None)
@given(
    st.binary(max_size=MAX_PAYLOAD_BYTES)
    | st.text(max_size=60).map(str.encode)
    | st.floats().map(lambda x: repr(x).encode())
)
def test_no_payload_raises_and_what_is_said_is_one_line(payload):
    values = StateValues()
    values.update("x", payload)
    for kind in ("integer", "number", "text"):
        said = values.get("x", kind)
        assert said is None or said.isprintable()
        assert kind == "text" or said is None or "e" not in said
