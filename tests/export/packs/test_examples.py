"""Examples that are drawn from a pack."""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_llm.domain.schema import TextSlot, allows, is_complete
from export.packs.examples import Example, ExampleMaker, Rephrased, held_out_examples
from export.packs.lines import Template, parse_mixed_line
from export.packs.noise import Piece, add_aside, add_noise
from export.packs.pack import Pack

SEEDS = st.integers(0, 2**32 - 1)


def draw(pack: Pack, seed: int, count: int) -> list[Example]:
    return list(itertools.islice(iter(ExampleMaker(pack, seed)), count))


def assert_valid(pack: Pack, example: Example) -> None:
    """Calls that the schema allows, an answer for each, and text values that were said."""
    assert example.text == example.text.strip() != ""
    assert (example.kind == "command") == bool(example.calls)
    assert len(example.calls) <= pack.schema.max_actions
    assert len(example.answers) == max(1, len(example.calls))
    for call in example.calls:
        action = pack.action(call.action)
        assert is_complete(action, dict(call.slots))
        for name, value in call.slots.items():
            assert allows(action.slots[name], value)
            if isinstance(action.slots[name], TextSlot):
                assert re.search(rf"(?<!\w){re.escape(str(value))}(?!\w)", example.text), (value, example)
                assert len(str(value).split()) <= action.slots[name].max_words


def test_the_same_seed_draws_the_same_examples(kitchen: Pack) -> None:
    assert draw(kitchen, 5, 300) == draw(kitchen, 5, 300)
    assert draw(kitchen, 5, 300) != draw(kitchen, 6, 300)


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS)
def test_every_example_is_valid(kitchen: Pack, seed: int) -> None:
    for example in draw(kitchen, seed, 60):
        assert_valid(kitchen, example)


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS)
def test_every_example_of_the_vehicle_is_valid(vehicle: Pack, seed: int) -> None:
    for example in draw(vehicle, seed, 100):
        assert_valid(vehicle, example)


def test_every_line_is_drawn(kitchen: Pack) -> None:
    sources = " ".join(example.source for example in draw(kitchen, 0, 3000))
    for template in (*(t for intent in kitchen.intents for t in intent.templates), *kitchen.mixed):
        assert template.where in sources
    assert {reply.name for reply in kitchen.replies} <= set(sources.split())


def test_a_number_out_of_range_is_answered_with_the_range_and_nothing_is_done(kitchen: Pack) -> None:
    beyond = [example for example in draw(kitchen, 1, 4000) if example.source.endswith(" out of range")]
    assert {example.source.split()[0] for example in beyond} == {"oven", "tune", "level"}
    ranges = {"oven": (50, 250), "tune": (87.5, 108), "level": (0, 10)}
    sentences = {words.out_of_range for words in kitchen.words.values()}
    written = 0
    for example in beyond:
        assert (example.kind, example.calls) == ("refusal", ())
        assert set(example.answers) <= sentences - {""}
        low, high = ranges[example.source.split()[0]]
        for number in re.findall(r"\d+\.?\d*", example.text):
            written += 1
            assert not low <= float(number) <= high or "point" in example.text
    assert written > 50


def test_two_commands_in_one_sentence(kitchen: Pack) -> None:
    joined = [example for example in draw(kitchen, 2, 2000) if " + " in example.source]
    assert len(joined) > 50
    for example in joined:
        first, second = example.calls
        assert first.action != second.action
        assert example.answers == (kitchen.answer(first), kitchen.answer(second))


def test_two_calls_of_one_action_keep_their_own_words(kitchen: Pack) -> None:
    template = kitchen.mixed[0]
    maker = ExampleMaker(kitchen, 3)
    for _ in range(200):
        example = maker.command(template)
        assert [str(call.slots["contact"]).lower() for call in example.calls] == ["ana", "doctor patel"]


@pytest.mark.parametrize("change", ["one-action", "one-action-at-a-time", "no-reply"])
def test_a_pack_that_lacks_something_draws_the_rest(change: str, kitchen: Pack) -> None:
    pack = kitchen
    if change == "one-action":
        pack = replace(kitchen, intents=tuple(i for i in kitchen.intents if i.action == "volume"), mixed=())
    elif change == "one-action-at-a-time":
        pack = replace(kitchen, schema=_at_a_time(kitchen, 1), mixed=())
    else:
        pack = replace(kitchen, replies=())
    for example in draw(pack, 0, 300):
        assert_valid(pack, example)


def test_the_answer_says_the_most_about_the_slots(kitchen: Pack) -> None:
    maker = ExampleMaker(kitchen, 0)
    off, on = (
        next(e for e in map(maker.command, itertools.repeat(kitchen.intents[0].templates[0])) if slots_of(e) == state)
        for state in ("off", "on")
    )
    assert off.answers == ("{which} goes out.",)
    assert on.answers == ("Turning {which} {state}.",)


def slots_of(example: Example) -> object:
    return example.calls[0].slots["state"]


def test_without_noise_words_are_as_they_are_written(kitchen: Pack) -> None:
    written = {template.text for reply in kitchen.replies for template in reply.templates}
    examples = list(itertools.islice(iter(ExampleMaker(kitchen, 0, noise=False)), 500))
    replies = {example.text for example in examples if example.source in {reply.name for reply in kitchen.replies}}
    assert replies == written
    assert "it is dark at the table" in {example.text for example in examples}


def test_more_wordings_are_drawn_beside_the_packs_own(kitchen: Pack) -> None:
    mixed = parse_mixed_line("give Zoe a bell | call contact=Zoe", kitchen.schema, "found")
    said = Template(("boil one",), (), "found")
    rephrased = [Rephrased(mixed, "command", ("Calling {contact}.",)), Rephrased(said, "fact", ("Eight minutes.",))]
    maker = ExampleMaker(kitchen, 0, rephrased=rephrased)
    examples = list(itertools.islice(iter(maker), 600))
    found = [example for example in examples if example.source == "found"]
    assert {example.kind for example in found} == {"command", "fact"}
    assert 50 < len(found) < 550
    for example in examples:
        assert_valid(kitchen, example)
    assert maker.source != ExampleMaker(kitchen, 0).source
    assert maker.source == ExampleMaker(kitchen, 0, rephrased=rephrased).source


def test_held_out_lines_are_taken_as_they_are_written(kitchen: Pack) -> None:
    examples = held_out_examples(kitchen)
    assert examples == held_out_examples(kitchen)
    texts = [example.text for example in examples]
    assert len(texts) == 8
    assert texts[0] == "lights out, all of them"
    assert "get Granny's number" in texts
    assert "Phone Ana, would you?" in texts
    assert texts[-2:] == ["when is an egg hard", "do my homework"]
    for example in examples:
        assert_valid(kitchen, example)
    assert examples[0].calls[0].slots == {"state": "off", "which": "all"}


def test_blind_lines_take_the_place_of_held_out_ones(kitchen: Pack) -> None:
    assert not {"when is my egg done", "oven on ninety, and ring Ana"} & {e.text for e in held_out_examples(kitchen)}
    command, *asked = held_out_examples(kitchen.judged_blind())
    assert command.text == "oven on ninety, and ring Ana"
    assert [dict(call.slots) for call in command.calls] == [{"degrees": 90}, {"contact": "Ana"}]
    assert [(e.text, e.kind) for e in asked] == [
        ("when is my egg done", "fact"),
        ("my egg is in the water: now what", "fact"),
    ]
    assert asked[0].answers == ("Eight minutes.",)


def test_held_out_lines_are_never_drawn(kitchen: Pack) -> None:
    places = {template.where for template in kitchen.held_out}
    places |= {template.where for reply in kitchen.replies for template in (*reply.held_out, *reply.blind)}
    places |= {template.where for template in kitchen.blind}
    assert not places & {place for example in draw(kitchen, 4, 2000) for place in example.source.split(" + ")}
    assert not {"do my homework", "is the air damp"} & {example.text.lower() for example in draw(kitchen, 4, 2000)}


@settings(max_examples=200, deadline=None)
@given(seed=SEEDS, value=st.sampled_from(["Ana", "Sean O'Brien", "the old mill, Bath", "I'm Bob", "Straße 5"]))
def test_noise_changes_a_value_with_its_words(seed: int, value: str) -> None:
    pieces = [Piece("get "), Piece(value, (0, "contact")), Piece("'s number, quickly.")]
    noisy = add_noise(pieces, ["please", "hey you"], ["now"], random.Random(seed))
    said = [piece for piece in noisy if piece.slot is not None]
    assert [piece.slot for piece in said] == [(0, "contact")]
    text = "".join(piece.text for piece in noisy)
    assert re.search(rf"(?<!\w){re.escape(said[0].text)}(?!\w)", text)
    assert letters(said[0].text) == letters(value)


def test_an_aside_leaves_the_utterance_whole() -> None:
    pieces = [Piece("Ring "), Piece("the old mill, Bath", (0, "contact")), Piece(" up, quickly.")]
    said = set()
    for seed in range(400):
        told = add_aside(pieces, ["sam is nineteen"], ["you know me"], random.Random(seed))
        assert [piece for piece in told if piece.slot is not None] == [pieces[1]]
        said.add("".join(piece.text for piece in told))
    plain = "ing the old mill, Bath up, quickly"
    assert said == {
        *(f"Sam is nineteen{joint}r{plain}." for joint in (", ", ", so ", " so ", " ")),
        *(f"R{plain}{joint}" for joint in (". You know me", ", you know me", " you know me", ".")),
        f"Sam is nineteen. R{plain}.",
    }
    chinese = [Piece("什么是人工智能")]
    assert all(add_aside(chinese, ["so"], ["well"], random.Random(seed)) == chinese for seed in range(100))


def test_asides_come_with_everything_but_small_talk(kitchen: Pack) -> None:
    told = replace(kitchen, asides_before=("zzz tells me",), asides_after=("so yyy says",))
    examples = [e for e in draw(told, 3, 4000) if re.search("zzz|yyy", e.text.casefold())]
    assert {example.kind for example in examples} == {"command", "fact", "refusal"}
    for example in examples:
        assert_valid(told, example)
    assert 0.05 < len(examples) / 4000 < 0.2


def test_the_ends_of_a_range_are_drawn_more_often(kitchen: Pack) -> None:
    drawn = [
        call.slots["degrees"]
        for example in draw(kitchen, 8, 6000)
        for call in example.calls
        if call.action == "oven.heat" and call.slots["degrees"] != 180
    ]
    # 201 values, of which chance would draw either end once in a hundred times.
    assert drawn.count(50) > 0.02 * len(drawn)
    assert len(set(drawn)) > 50


def letters(text: str) -> str:
    return re.sub(r"\W", "", text.casefold())


def _at_a_time(pack: Pack, count: int) -> object:
    import msgspec

    return msgspec.structs.replace(pack.schema, max_actions=count)
