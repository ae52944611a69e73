"""domain.json: read strictly, and values of slots read back as they were written."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_llm.domain.schema import (
    Action,
    ChoiceSlot,
    DomainSchema,
    IntegerSlot,
    NumberSlot,
    StateValue,
    TextSlot,
    allows,
    decode_domain,
    encode_domain,
    is_complete,
    read_value,
    spoken,
    written,
)
from edge_llm.errors import ManifestError
from tests.domain.pack import SCHEMA

DEGREES = IntegerSlot(min=16, max=28)
MHZ = NumberSlot(min=87.5, max=108.0)
FINE = NumberSlot(min=0.0, max=99_999.0, decimals=3)
STATE = ChoiceSlot(values={"on": "on", "off": "switched off"})
PLACE = TextSlot(max_words=3)
# Other scripts' digits among them: Arabic, full width, superscript.
NO_DEGREES = [
    "", " ", "15", "29", "116", "+20", "-20", "1e3", "2e1", "20.0", "20 ", " 20", "2_0", "0x14",
    "\u0662\u0660", "\uff12\uff10", "\u00b2", "20\u00b2", "nan", "inf", "twenty", "9" * 5000,
]  # fmt: skip
NO_MHZ = [
    "", "87.4", "108.1", "100", "100.", "100.00", "99.95", "1e2", "+99.9", "-99.9", "099.9", "99,9", " 99.9", "9_9.9",
    "\u0669\u0669.\u0669", "\uff19\uff19.\uff19", "nan", "inf", "-inf", "1e999", "9" * 5000 + ".0",
]  # fmt: skip


def domain(*actions: Action, **fields) -> DomainSchema:
    return DomainSchema(format=1, name="x", version="1", failure="Sorry.", actions=actions, **fields)


def test_a_schema_is_read_as_it_was_written():
    assert decode_domain(encode_domain(SCHEMA)) == SCHEMA


def test_it_is_written_for_people():
    assert encode_domain(SCHEMA).count(b"\n") > 20


def test_every_token_of_the_form_is_there_once_and_in_the_same_order():
    tokens = SCHEMA.special_tokens()
    assert len(tokens) == len(set(tokens))
    assert tokens == decode_domain(encode_domain(SCHEMA)).special_tokens()
    for token in (
        "<|say|>",
        "<|refusal|>",
        "<|action go.to|>",
        "<|slot place|>",
        "<|value place|>",
        "<|value range_km|>",
    ):
        assert token in tokens
    assert "<|slot range_km|>" not in tokens


def test_actions_are_found_by_name():
    action = SCHEMA.action("go.to")
    assert action is not None
    assert action.confirm
    assert SCHEMA.action("fly.to") is None


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (domain(Action(name="a"), Action(name="a")), "defines an action twice"),
        (domain(Action(name="a", one_of=("x", "y"))), "one_of of a must name two or more of its slots"),
        (domain(Action(name="a", slots={"x": DEGREES}, one_of=("x",))), "one_of of a must name two or more"),
        (domain(Action(name="a", slots={"x": DEGREES}, one_of=("x", "x"))), "one_of of a must name two or more"),
        (
            domain(Action(name="a", slots={"x": DEGREES, "y": STATE, "z": PLACE}, one_of=("x", "z"))),
            "one_of of a names must stand together",
        ),
        (domain(Action(name="a", slots={"x": IntegerSlot(min=2, max=1)})), "a.x has min 2 above max 1"),
        (domain(Action(name="a", slots={"x": NumberSlot(min=2.5, max=1.0)})), "a.x has min 2.5 above max 1.0"),
        (
            domain(Action(name="a", slots={"x": NumberSlot(min=0.05, max=1.0)})),
            "a.x has a bound of more than 1 decimals",
        ),
        (
            domain(
                Action(name="a", slots={"x": DEGREES}), state={"x": StateValue(type="integer", fallback="Not known.")}
            ),
            "'x' is both a slot and a state value",
        ),
    ],
)
def test_what_contradicts_itself_is_refused_by_name(schema, message):
    with pytest.raises(ManifestError, match=message):
        decode_domain(encode_domain(schema))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format"),
        ({"failure": ""}, "failure"),
        ({"max_actions": 0}, "max_actions"),
        ({"max_actions": 9}, "max_actions"),
        ({"surprise": 1}, "surprise"),
        ({"actions": [{"name": "a b"}]}, r"actions\[0\].name"),
        ({"actions": [{"name": "Window"}]}, r"actions\[0\].name"),
        ({"actions": [{"name": "a.b.c"}]}, r"actions\[0\].name"),
        ({"actions": [{"name": "a|>"}]}, r"actions\[0\].name"),
        ({"actions": [{"name": "a", "slots": {"x y": {"type": "text"}}}]}, "slots"),
        ({"actions": [{"name": "a", "slots": {"x": {"type": "colour"}}}]}, "colour"),
        ({"actions": [{"name": "a", "slots": {"x": {"type": "integer", "min": -1, "max": 3}}}]}, "min"),
        ({"actions": [{"name": "a", "slots": {"x": {"type": "integer", "min": 0, "max": 100_000}}}]}, "max"),
        (
            {"actions": [{"name": "a", "slots": {"x": {"type": "number", "min": 0, "max": 1, "decimals": 0}}}]},
            "decimals",
        ),
        ({"actions": [{"name": "a", "slots": {"x": {"type": "choice", "values": {}}}}]}, "values"),
        ({"actions": [{"name": "a", "slots": {"x": {"type": "choice", "values": {"the car": "x"}}}}]}, "values"),
        ({"actions": [{"name": "a", "slots": {"x": {"type": "text", "max_words": 0}}}]}, "max_words"),
        ({"actions": [{"name": "a", "slots": {f"s{n}": {"type": "text"} for n in range(9)}}]}, "slots"),
        ({"state": {"x": {"type": "bool", "fallback": "No."}}}, "state"),
        ({"state": {"x": {"type": "text"}}}, "fallback"),
    ],
)
def test_what_is_malformed_is_refused_by_field(change, message):
    fields = msgspec.json.decode(encode_domain(SCHEMA)) | change
    with pytest.raises(ManifestError, match=message):
        decode_domain(msgspec.json.encode(fields))


@pytest.mark.parametrize("raw", [b"", b"\xff", b"[]", b"null", b"[" * 100_000, encode_domain(SCHEMA)[:-20]])
def test_what_is_no_schema_at_all_is_refused(raw):
    with pytest.raises(ManifestError, match=r"domain\.json is not valid"):
        decode_domain(raw)


@pytest.mark.parametrize(("text", "value"), [("16", 16), ("28", 28), ("20", 20)])
def test_whole_numbers_within_their_range_are_read(text, value):
    assert read_value(DEGREES, text) == value


@pytest.mark.parametrize("text", NO_DEGREES)
def test_what_is_no_whole_number_of_the_range_is_not(text):
    assert read_value(DEGREES, text) is None


@pytest.mark.parametrize(("text", "value"), [("87.5", 87.5), ("108.0", 108.0), ("99.9", 99.9)])
def test_numbers_are_read_with_their_decimals(text, value):
    assert read_value(MHZ, text) == value


@pytest.mark.parametrize("text", NO_MHZ)
def test_what_is_no_number_of_the_range_is_not(text):
    assert read_value(MHZ, text) is None


def test_there_is_no_negative_zero():
    assert read_value(FINE, "0.000") == 0.0
    assert read_value(FINE, "-0.000") is None


@pytest.mark.parametrize(
    ("text", "value"),
    [("on", "on"), (" off", "off"), ("", None), (" On", None), ("on off", None), ("switched off", None)],
)
def test_choices_are_exact(text, value):
    assert read_value(STATE, text) == value


@pytest.mark.parametrize(("text", "value"), [(" Main Street ", "Main Street"), ("", None), (" \n", None)])
def test_text_is_what_is_left_between_spaces(text, value):
    assert read_value(PLACE, text) == value


@settings(deadline=None)
@given(st.text() | st.from_regex(r"[-+]?[0-9]{0,6}\.?[0-9]{0,4}(e[0-9])?", fullmatch=True))
def test_whatever_is_read_is_allowed(text):
    for slot in (DEGREES, MHZ, FINE, STATE, PLACE):
        value = read_value(slot, text)
        assert value is None or allows(slot, value)


@settings(deadline=None)
@given(st.data())
def test_what_is_written_is_read_back(data):
    slot = data.draw(st.sampled_from([DEGREES, MHZ, FINE, STATE]))
    if isinstance(slot, ChoiceSlot):
        value = data.draw(st.sampled_from(sorted(slot.values)))
    elif isinstance(slot, IntegerSlot):
        value = data.draw(st.integers(slot.min, slot.max))
    else:
        value = round(data.draw(st.floats(slot.min, slot.max)), slot.decimals)
    assert read_value(slot, written(slot, value)) == value


@pytest.mark.parametrize(
    ("slot", "value", "allowed"),
    [
        (DEGREES, 20, True),
        (DEGREES, 29, False),
        (DEGREES, True, False),
        (DEGREES, 20.0, False),
        (DEGREES, "20", False),
        (MHZ, 99.9, True),
        (MHZ, 99, True),
        (MHZ, float("nan"), False),
        (MHZ, False, False),
        (STATE, "on", True),
        (STATE, "maybe", False),
        (PLACE, "home", True),
        (PLACE, "  ", False),
        (PLACE, 5, False),
    ],
)
def test_a_value_of_another_type_is_not_allowed(slot, value, allowed):
    assert allows(slot, value) is allowed


@pytest.mark.parametrize(
    ("slot", "value", "words"),
    [
        (DEGREES, 20, "20"),
        (MHZ, 99.9, "99.9"),
        (MHZ, 100.0, "100"),
        (FINE, 99_998.125, "99998.125"),
        (STATE, "off", "switched off"),
        (PLACE, "Main Street", "Main Street"),
    ],
)
def test_values_are_said_in_words_that_people_use(slot, value, words):
    assert spoken(slot, value) == words


def test_an_action_needs_all_its_slots_and_one_of_the_alternatives():
    action = Action(name="a", slots={"x": DEGREES, "y": STATE, "z": PLACE}, one_of=("y", "z"))
    assert is_complete(action, {"x": 20, "y": "on"})
    assert is_complete(action, {"x": 20, "z": "home"})
    assert not is_complete(action, {"x": 20})
    assert not is_complete(action, {"y": "on"})
    assert not is_complete(action, {"x": 20, "y": "on", "z": "home"})
    assert not is_complete(action, {"x": 20, "y": "on", "w": 1})
    assert is_complete(Action(name="a"), {})
    assert not is_complete(Action(name="a"), {"x": 1})
