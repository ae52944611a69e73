"""The shipped pack: what the host may rely on, and that the grammar can write all of it."""

from __future__ import annotations

import itertools

import pytest

from edge_llm.domain.grammar import DomainGrammar, GrammarState
from edge_llm.domain.schema import ChoiceSlot, IntegerSlot, NumberSlot, Slot, TextSlot
from export.packs.encode import ExampleEncoder
from export.packs.examples import ExampleMaker, held_out_examples
from export.packs.pack import Pack
from export.packs.wording import SEVERAL, check_wordings, distinct_wordings, held_out_wordings
from tests.export.packs.small_pack import tokenizer_for

ACTIONS: dict[str, dict[str, object]] = {
    "climate.set_temperature": {"temperature_c": (16, 28)},
    "climate.fan": {"level": (1, 7)},
    "climate.power": {"state": {"on", "off"}},
    "climate.defrost": {"where": {"front", "rear"}},
    "window.move": {
        "which": {"driver", "passenger", "rear_left", "rear_right", "all"},
        "action": {"open", "close"},
    },
    "seat.heat": {"which": {"driver", "passenger"}, "level": (0, 3)},
    "media.transport": {"action": {"play", "pause", "next", "previous"}},
    "media.volume": {"level": (0, 100), "change": {"up", "down"}},
    "media.tune": {"frequency_mhz": 1},
    "nav.go": {"destination": str},
    "nav.cancel": {},
    "nav.nearest": {"category": {"charging", "fuel", "parking", "restaurant", "hospital", "pharmacy"}},
    "phone.call": {"contact": str},
    "phone.hangup": {},
    "lights.set": {"which": {"cabin", "fog", "headlights"}, "state": {"on", "off"}},
    "wipers.set": {"speed": {"off", "slow", "fast"}},
    "doors.set": {"state": {"locked", "unlocked"}},
    "trunk.open": {},
    "cruise.set": {"speed_kmh": (30, 130)},
    "timer.set": {"minutes": (1, 180)},
    "status.range": {},
    "status.tyres": {},
    "status.charge": {},
    "help": {},
}
CONFIRMED = {"doors.set", "trunk.open", "cruise.set"}


def described(slot: Slot) -> object:
    """Range, choices, decimals, or text."""
    if isinstance(slot, IntegerSlot):
        return (slot.min, slot.max)
    if isinstance(slot, NumberSlot):
        return slot.decimals
    if isinstance(slot, ChoiceSlot):
        return set(slot.values)
    assert isinstance(slot, TextSlot)
    return str


def test_actions_are_the_contract_with_the_host(vehicle: Pack) -> None:
    actions = vehicle.schema.actions
    found = {action.name: {name: described(slot) for name, slot in action.slots.items()} for action in actions}
    assert found == ACTIONS
    assert {action.name for action in actions if action.confirm} == CONFIRMED
    assert {action.name: set(action.one_of) for action in actions if action.one_of} == {
        "media.volume": {"level", "change"}
    }


def test_no_wording_means_two_things_or_is_both_trained_and_tested_on(vehicle: Pack) -> None:
    check_wordings(vehicle)


def test_there_are_enough_wordings(vehicle: Pack) -> None:
    trained = distinct_wordings(vehicle)
    assert sum(trained[name] for name in ACTIONS) / len(ACTIONS) >= 80
    assert min(trained[name] for name in ACTIONS) >= 40
    assert trained["refusal"] >= 300
    tested = held_out_wordings(vehicle)
    assert all(tested[name] >= 10 for name in (*ACTIONS, SEVERAL, "fact", "chat", "refusal"))
    blind = held_out_wordings(vehicle.judged_blind())
    assert sum(blind[name] for name in ACTIONS) >= 300
    assert blind["refusal"] >= 300


@pytest.fixture(scope="module")
def writable(vehicle: Pack):
    """Whether the grammar lets a model write just the answer of an example."""
    tokenizer = tokenizer_for(vehicle.schema)
    grammar = DomainGrammar(vehicle.schema, tokenizer)
    encoder = ExampleEncoder(vehicle.schema, tokenizer)

    def is_writable(example) -> bool:
        token_ids, start = encoder.encode(example)
        state = GrammarState(grammar, token_ids[:start])
        for token_id in token_ids[start:]:
            allowed = state.allowed()
            if allowed is not None and token_id not in allowed:
                return False
            state.advance(token_id)
        return state.in_text

    return is_writable


def test_the_grammar_allows_every_held_out_answer(vehicle: Pack, writable) -> None:
    examples = held_out_examples(vehicle)
    assert len(examples) > 500
    assert [example.text for example in examples if not writable(example)] == []


def test_the_grammar_allows_the_answers_that_are_trained_on(vehicle: Pack, writable) -> None:
    examples = list(itertools.islice(iter(ExampleMaker(vehicle, 0)), 2000))
    refused = [example.text for example in examples if not writable(example)]
    assert len(refused) <= 0.002 * len(examples), refused
