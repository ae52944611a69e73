"""What a line of a pack means."""

from __future__ import annotations

import pytest

from export.packs.lines import Call, SlotPart, Template, parse_intent_line, parse_mixed_line, parse_reply_line
from export.packs.pack import Pack


def intent_line(pack: Pack, action: str, line: str, **fixed: str) -> Template:
    return parse_intent_line(line, pack.action(action), fixed, "file:7")


def test_the_ways_of_giving_a_slot(kitchen: Pack) -> None:
    line = intent_line(kitchen, "light.set", "put [everything](which=all) {state}, please")
    assert line.parts == ("put ", SlotPart("which", "everything"), " ", SlotPart("state"), ", please")
    assert line.calls == (Call("light.set", {"which": "all"}),)
    assert line.text == "put everything {state}, please"
    assert line.where == "file:7"
    said_by_none = intent_line(kitchen, "light.set", "it is dark | which=table, state=on")
    assert said_by_none.parts == ("it is dark",)
    assert said_by_none.calls == (Call("light.set", {"which": "table", "state": "on"}),)
    fixed = intent_line(kitchen, "light.set", "kill the {which}", state="off")
    assert fixed.calls == (Call("light.set", {"state": "off"}),)


def test_values_have_their_slots_type(kitchen: Pack) -> None:
    assert intent_line(kitchen, "oven.heat", "[hot](degrees=250)").calls[0].slots == {"degrees": 250}
    assert intent_line(kitchen, "radio.tune", "[jazz](mhz=99)").calls[0].slots == {"mhz": 99.0}
    assert intent_line(kitchen, "call", "[Ana](contact)").calls[0].slots == {"contact": "Ana"}


def test_alternatives_need_one(kitchen: Pack) -> None:
    assert intent_line(kitchen, "volume", "[loud](level=9)").calls[0].slots == {"level": 9}
    assert intent_line(kitchen, "volume", "[louder](change=up)").calls[0].slots == {"change": "up"}


@pytest.mark.parametrize("words", ["a | b", "a|b", "(a) or (b)", "3 > 2 = true; so"])
def test_a_reply_is_plain_words(words: str) -> None:
    assert parse_reply_line(words, "file:1") == Template((words,), (), "file:1")


def test_text_of_several_actions_is_found_in_the_words(kitchen: Pack) -> None:
    line = "call ANA, then [Ana] no Doctor Patel".replace("[Ana] ", "")
    calls = 'call contact="doctor patel"; call contact=Ana'
    template = parse_mixed_line(f"{line} | {calls}", kitchen.schema, "file:1")
    assert template.parts == (
        "call ",
        SlotPart("contact", "ANA", 1),
        ", then no ",
        SlotPart("contact", "Doctor Patel", 0),
    )
    assert [call.slots["contact"] for call in template.calls] == ["doctor patel", "Ana"]


def test_quotes_hold_a_value_together(kitchen: Pack) -> None:
    template = parse_mixed_line('ring Mo; Jo and Al now | call contact="Mo; Jo and Al"', kitchen.schema, "file:1")
    assert template.calls == (Call("call", {"contact": "Mo; Jo and Al"}),)


def test_scripts_without_spaces_have_no_edges_of_words(kitchen: Pack) -> None:
    template = parse_mixed_line("打电话给王芳 | call contact=王芳", kitchen.schema, "file:1")
    assert template.parts == ("打电话给", SlotPart("contact", "王芳"))


def test_a_reader_sees_where_each_line_stands(kitchen: Pack) -> None:
    places = {template.text: template.where for intent in kitchen.intents for template in intent.templates}
    assert places["switch the {which} {state}"].endswith("room.toml:6")
    assert places["it is dark at the table"].endswith("room.toml:9")
    assert kitchen.mixed[1].where.endswith("things.toml:55")
