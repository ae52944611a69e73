"""Payloads, without a broker."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_llm.errors import RequestError
from edge_llm.mqtt.messages import (
    Cancel,
    Feedback,
    Incoming,
    Partial,
    Query,
    claimed_id,
    claimed_reply_to,
    decode_fields,
    id_from_correlation,
)

NESTED = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def decode(payload: bytes, content_type: str | None = None, bare_field: str | None = "text"):
    incoming = Incoming("t", payload, 0.0, content_type=content_type)
    return decode_fields(incoming, max_payload_bytes=1000, bare_field=bare_field)


def refusal(call, *arguments, **options) -> RequestError:
    with pytest.raises(RequestError) as raised:
        call(*arguments, **options)
    return raised.value


def code_of(call) -> int | None:
    try:
        call()
    except RequestError as error:
        return error.code
    return None


@pytest.mark.parametrize(
    ("payload", "content_type", "fields"),
    [
        (b"Hello?", None, {"text": "Hello?"}),
        ("Grüße 🌍".encode(), None, {"text": "Grüße 🌍"}),
        (b"\xef\xbb\xbfbom", None, {"text": "bom"}),
        (b' \n{"text": "hi"}', None, {"text": "hi"}),
        (b'\xef\xbb\xbf{"text": "hi"}', None, {"text": "hi"}),
        (b'{"text": "hi"}', "application/json", {"text": "hi"}),
        (b'{"text": "hi"}', "Application/JSON; charset=UTF-8", {"text": "hi"}),
        (b"{not json", "text/plain", {"text": "{not json"}),
        (b"[1] is a list", None, {"text": "[1] is a list"}),
    ],
)
def test_json_or_text(payload, content_type, fields):
    assert decode(payload, content_type) == fields


@pytest.mark.parametrize(
    ("payload", "content_type", "code", "word"),
    [
        (b"\xff", None, 400, "UTF-8"),
        (b'{"a": "\xff"}', None, 400, "UTF-8"),
        (b"{", None, 400, "JSON"),
        (b'{"a": NaN}', None, 400, "JSON"),
        (b'{"a": 1e999}', None, 400, "JSON"),
        (b'{"a": "\\ud800"}', None, 400, "JSON"),
        (b"hello", "application/json", 400, "JSON"),
        (b"[1]", "application/json", 400, "object"),
        (b'{"a": ' + b"[" * 900, None, 400, "JSON"),
        (b"x" * 1001, None, 413, "1000"),
        (b"x", "image/png", 415, "image/png"),
        (b"x", "text/plain; charset=latin-1", 415, "utf-8"),
    ],
)
def test_what_is_not_even_an_object(payload, content_type, code, word):
    error = refusal(decode, payload, content_type)
    assert error.code == code
    assert word in error.message


def test_nesting_is_bounded():
    payload = b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    error = refusal(decode_fields, Incoming("t", payload, 0.0), max_payload_bytes=1 << 20, bare_field="text")
    assert (error.code, "deep" in error.message) == (400, True)


def test_bare_text_where_none_is_meant():
    assert refusal(decode, b"hello", bare_field=None).code == 400


def test_a_whole_query():
    query = Query.parse({"text": "hi", "session": "s", "stop": ["a", "b"], "top_p": 1, "seed": 0, "id": None})
    assert (query.text, query.session, query.stop, query.top_p, query.id) == ("hi", "s", ("a", "b"), 1.0, None)
    assert query.stream
    assert Query.parse({"messages": [{"role": "user", "content": "hi"}]}).messages


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({}, "exactly one"),
        ({"text": "  \n"}, "empty"),
        ({"text": "a", "messages": [{"role": "user", "content": "a"}]}, "exactly one"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "role"),
        ({"messages": [{"role": "user", "content": "a", "name": "x"}]}, "name"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "user's"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}, "system"),
        ({"messages": [{"role": "user", "content": "a"}], "session": "s"}, "session"),
        ({"text": "a", "colour": 1}, "colour"),
        ({"text": 1}, "text"),
        ({"text": "a", "id": ""}, "id"),
        ({"text": "a", "id": "x" * 65}, "id"),
        ({"text": "a", "id": "a\nb"}, "id"),
        ({"text": "a", "session": "\x1b[0m"}, "session"),
        ({"text": "a", "supersedes": 1}, "supersedes"),
        ({"text": "a", "stream": 1}, "stream"),
        ({"text": "a", "max_tokens": 0}, "max_tokens"),
        ({"text": "a", "max_tokens": True}, "max_tokens"),
        ({"text": "a", "max_tokens": "5"}, "max_tokens"),
        ({"text": "a", "temperature": -0.1}, "temperature"),
        ({"text": "a", "temperature": 5.1}, "temperature"),
        ({"text": "a", "temperature": float("nan")}, "temperature"),
        ({"text": "a", "temperature": float("inf")}, "temperature"),
        ({"text": "a", "top_k": -1}, "top_k"),
        ({"text": "a", "top_p": 0}, "top_p"),
        ({"text": "a", "top_p": 1.1}, "top_p"),
        ({"text": "a", "min_p": 1}, "min_p"),
        ({"text": "a", "repetition_penalty": 0}, "repetition_penalty"),
        ({"text": "a", "seed": -1}, "seed"),
        ({"text": "a", "seed": 2**64}, "seed"),
        ({"text": "a", "stop": "x"}, "stop"),
        ({"text": "a", "stop": ["x"] * 5}, "stop"),
        ({"text": "a", "stop": [""]}, "stop"),
        ({"text": "a", "stop": ["x" * 129]}, "stop"),
        ({"text": "a", "deadline_ms": 0}, "deadline_ms"),
        ({"text": "a", "priority": "urgent"}, "priority"),
        ({"text": "a", "cache": "never"}, "cache"),
        ({"text": "a", "reply_to": 1}, "reply_to"),
    ],
)
def test_a_wrong_field_is_named(fields, word):
    error = refusal(Query.parse, fields)
    assert error.code == 400
    assert word in error.message


def test_the_other_messages():
    assert Partial.parse({"utterance": "u", "seq": 1, "text": ""}).text == ""
    assert Cancel.parse({"id": "q"}).id == "q"
    assert Feedback.parse({"id": "q", "rating": -1, "correction": "c"}).rating == -1
    for kind, fields in (
        (Partial, {"utterance": "u", "seq": -1, "text": ""}),
        (Partial, {"utterance": "u\0", "seq": 1, "text": ""}),
        (Cancel, {}),
        (Cancel, {"id": "a\x7f"}),
        (Cancel, {"id": None}),
        (Feedback, {"id": "q", "rating": 2}),
        (Feedback, {"id": "q", "rating": 1.5}),
        (Feedback, {"id": "q", "rating": 1, "stars": 5}),
    ):
        assert refusal(kind.parse, fields).code == 400


@pytest.mark.parametrize(
    ("correlation", "expected"),
    [
        (None, None),
        (b"", None),
        (b"turn-7", "turn-7"),
        ("é".encode(), "é"),
        (b"\x00\xff", "00ff"),
        (b"a\nb", "610a62"),
        (b"x" * 64, "x" * 64),
        (b"x" * 65, "78" * 32),
    ],
)
def test_correlation_as_id(correlation, expected):
    assert id_from_correlation(correlation) == expected


def test_what_a_bad_message_claims():
    assert claimed_id({"id": "q"}, b"c") == "q"
    assert claimed_id({"id": 5}, b"c") == "c"
    assert claimed_id({"id": "a\nb"}, None) is None
    assert claimed_reply_to({"reply_to": "a"}, "b") == "a"
    assert claimed_reply_to({"reply_to": None}, "b") == "b"
    assert claimed_reply_to({}, None) is None


@given(st.binary(max_size=60), st.none() | st.sampled_from(["application/json", "text/plain", "x", ";", "a;charset="]))
def test_no_bytes_crash_decoding(payload, content_type):
    assert code_of(lambda: claimed_id(decode(payload, content_type), payload)) in (None, 400, 413, 415)


@given(st.dictionaries(st.sampled_from(Query.__struct_fields__) | st.text(), NESTED, max_size=6))
def test_no_fields_crash_parsing(fields):
    fields = decode(msgspec.json.encode(fields)) if len(msgspec.json.encode(fields)) <= 1000 else fields
    for kind in (Query, Partial, Cancel, Feedback):
        assert code_of(lambda kind=kind: kind.parse(fields)) in (None, 400)


@given(st.binary(min_size=1))
def test_an_id_from_correlation_is_a_valid_id(correlation):
    made = id_from_correlation(correlation)
    assert made is not None
    assert Cancel.parse({"id": made}).id == made
