"""Every valid answer can come out of the grammar, and nothing else before the text."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_llm.domain.answer import DomainAnswer
from edge_llm.domain.grammar import DomainGrammar, GrammarState, TrieNode
from edge_llm.domain.schema import Action, DomainSchema, IntegerSlot, NumberSlot, TextSlot, allows, is_complete
from edge_llm.domain.state_values import StateValues
from edge_llm.engine.tokenizer import Tokenizer
from edge_llm.errors import ManifestError
from tests.domain.pack import GRAMMAR, SCHEMA, TOKENIZER, accepts, ids, prompt, state
from tests.fakes import SPECIAL_TOKENS, byte_tokenizer

GO = SCHEMA.action("go.to")
WARMER = ("<|action climate.set|>", "<|slot degrees|>", "21")
# What speech recognisers and keyboards produce, and what they do not.
WORDS = st.sampled_from([
    "take", "me", "to", "Granny's", "O\u2019Hara\u2019s", "café", "'Zürich'", "Rock'n'Roll", "7:30", "C++", "—", "😀",
    "!?", "東京駅", "まで", "서울", "हिन्दी", "cafe\u0301", "1️⃣", "❤️", "<|say|>", "…home,", "and/or", "s'", "'s", "_",
])  # fmt: skip
TEXTS = st.lists(WORDS | st.text(max_size=6), max_size=8).map(" ".join) | st.text(max_size=30)


def domain(*actions: Action, **fields) -> DomainSchema:
    return DomainSchema(format=1, name="x", version="1", failure="Sorry.", actions=actions, **fields)


def said(text: str, max_words: int = 3, tokenizer: Tokenizer = TOKENIZER) -> set[str]:
    """Everything that a text slot may hold in answer to ``text``."""
    schema = domain(Action(name="go.to", slots={"place": TextSlot(max_words=max_words)}))
    grammar = GRAMMAR if tokenizer is TOKENIZER and max_words == 3 else DomainGrammar(schema, tokenizer)
    action = grammar.schema.action("go.to")
    assert action is not None
    root = grammar.trie(action, "place", prompt(text, tokenizer))
    return {tokenizer.decode(token_ids) for token_ids in paths(root)}


def paths(node: TrieNode, before: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    if node.is_end:
        yield before
    for token_id, child in node.children.items():
        yield from paths(child, (*before, token_id))


@pytest.mark.parametrize(
    "answer",
    [
        ["<|chat|>", "<|say|>", "Hello."],
        ["<|fact|>", "<|say|>", "A heat pump moves heat.", "<|end|>"],
        ["<|refusal|>", "<|say|>", "I cannot do that."],
        ["<|command|>", "<|action trunk.open|>", "<|say|>", "Opening.", "<|end|>"],
        ["<|command|>", "<|action go.to|>", "<|slot place|>", " the coast", "<|say|>", "Off we go."],
        ["<|command|>", "<|action volume|>", "<|slot level|>", "0", "<|say|>", "Quiet."],
        ["<|command|>", "<|action volume|>", "<|slot change|>", " down", "<|say|>", "Less."],
        ["<|command|>", "<|action play|>", "<|slot song|>", " coast", "<|say|>", "Yes."],
        ["<|command|>", "<|action play|>", "<|slot station|>", " news", "<|say|>", "Yes."],
        ["<|command|>", "<|action trunk.open|>", "<|action trunk.open|>", "<|say|>", "One.", "<|say|>", "Two."],
        [
            "<|command|>",
            *WARMER,
            "<|action window.move|>",
            "<|slot which|>",
            " driver",
            "<|slot action|>",
            " close",
            "<|say|>",
        ],
    ],
    ids=lambda parts: "".join(parts[:4]),
)
def test_every_valid_answer_can_come(answer):
    assert accepts(ids(*answer), "take me to the coast")


@pytest.mark.parametrize("value", ["open", "open-wide", "close"])
def test_every_choice_can_come(value):
    head = ["<|command|>", "<|action window.move|>", "<|slot which|>", " all", "<|slot action|>"]
    assert accepts(ids(*head, " " + value, "<|say|>"))


def test_just_the_numbers_of_the_range_can_come():
    head = ["<|command|>", "<|action climate.set|>", "<|slot degrees|>"]
    assert [n for n in range(130) if accepts(ids(*head, str(n), "<|say|>"))] == list(range(16, 29))
    for text in ("", "-20", "+20", "020", "20.0", "2e1", "\uff12\uff10"):
        assert not accepts(ids(*head, text, "<|say|>"))


def test_just_the_decimals_of_the_range_can_come():
    head = ["<|command|>", "<|action radio.tune|>", "<|slot mhz|>"]
    tenths = [n for n in range(800, 1200) if accepts(ids(*head, f"{n / 10:.1f}", "<|say|>"))]
    assert tenths == list(range(875, 1081))
    for text in ("100", "100.", "100.00", ".5"):
        assert not accepts(ids(*head, text, "<|say|>"))


@pytest.mark.parametrize(
    "answer",
    [
        ["<|say|>"],
        ["Hello"],
        ["<|end|>"],
        ["<|action trunk.open|>"],
        ["<|fact|>", "<|action trunk.open|>"],
        ["<|fact|>", "<|fact|>"],
        ["<|command|>", "<|say|>"],
        ["<|command|>", "<|slot place|>"],
        ["<|command|>", "<|action trunk.open|>", "<|slot place|>"],
        ["<|command|>", "<|action trunk.open|>", "<|end|>"],
        ["<|command|>", "<|action go.to|>", "<|say|>"],
        ["<|command|>", "<|action go.to|>", "<|slot degrees|>"],
        ["<|command|>", "<|action go.to|>", "<|slot place|>", "<|say|>"],
        ["<|command|>", "<|action window.move|>", "<|slot action|>"],
        ["<|command|>", "<|action window.move|>", "<|slot which|>", " driver", "<|say|>"],
        ["<|command|>", "<|action window.move|>", "<|slot which|>", " passenger"],
        ["<|command|>", "<|action window.move|>", "<|slot which|>", " driv", "<|slot action|>"],
        ["<|command|>", "<|action window.move|>", "<|slot which|>", "driver"],
        ["<|command|>", "<|action volume|>", "<|slot level|>", "5", "<|slot change|>"],
        ["<|command|>", "<|action volume|>", "<|say|>"],
        ["<|command|>", "<|action go.to|>", "<|slot place|>", " Rome"],
        ["<|command|>", "<|action go.to|>", "<|slot place|>", " take me to the"],
        ["<|command|>", *["<|action trunk.open|>"] * 3],
    ],
    ids="".join,
)
def test_nothing_else_can_come_before_the_text(answer):
    assert not accepts(ids(*answer), "take me to the coast")


def test_after_the_first_sentence_has_begun_anything_may_come():
    said_something = state("hi", *ids("<|chat|>", "<|say|>"))
    assert said_something.in_text
    assert said_something.allowed() is None
    said_something.advance(ids("<|action trunk.open|>")[0])
    assert said_something.allowed() is None


def test_no_more_actions_than_the_pack_allows():
    one = state("", *ids("<|command|>", "<|action trunk.open|>"))
    assert one.allowed() == frozenset([*GRAMMAR.wordless, GRAMMAR.say_id])
    two = state("", *ids("<|command|>", "<|action trunk.open|>", "<|action trunk.open|>"))
    assert two.allowed() == {GRAMMAR.say_id}


def test_of_alternatives_exactly_one_can_come():
    volume = state("", *ids("<|command|>", "<|action volume|>"))
    assert volume.allowed() == set(ids("<|slot level|>", "<|slot change|>"))
    for token_id in ids("<|slot change|>", " up"):
        volume.advance(token_id)
    allowed = volume.allowed()
    assert allowed is not None
    assert not allowed & set(ids("<|slot level|>", "<|slot change|>"))


# --- what was said -------------------------------------------------------------------------------------------------


def test_a_text_slot_holds_any_run_of_what_was_said():
    assert said("to the coast") == {" to", " to the", " to the coast", " the", " the coast", " coast"}


def test_no_more_words_in_a_row_than_the_slot_has():
    assert said("a b c d", max_words=2) == {" a", " b", " c", " d", " a b", " b c", " c d"}


@pytest.mark.parametrize("text", ["Rome.", "“Rome”?", "'Rome'", "…Rome!!", "(Rome),", "- Rome -", "Rome 😀", "Rome❤️"])
def test_punctuation_around_a_run_is_left_out(text):
    assert said(text) == {" Rome"}


def test_punctuation_within_a_run_stays():
    assert said("Rock'n'Roll, AC/DC 7:30") == {
        " Rock'n'Roll", " AC/DC", " 7:30", " Rock'n'Roll, AC/DC", " AC/DC 7:30", " Rock'n'Roll, AC/DC 7:30"
    }  # fmt: skip


@pytest.mark.parametrize("apostrophe", ["'", "\u2019"])
def test_a_possessive_is_the_person_too(apostrophe):
    assert said(f"Granny{apostrophe}s place") == {
        " Granny", f" Granny{apostrophe}s", f" Granny{apostrophe}s place", " place"
    }  # fmt: skip
    assert said("it 's") == {" it", " it 's", " s"}


def test_letters_stay_as_they_were_said():
    assert said("New york") == {" New", " New york", " york"}
    assert not accepts(ids("<|command|>", "<|action go.to|>", "<|slot place|>", " new"), "New york")


def test_without_spaces_each_character_is_a_word():
    assert said("東京駅", max_words=2) == {" 東", " 京", " 駅", " 東京", " 京駅"}
    assert " 東京 hotel" in said("東京 hotelまで")


def test_a_run_can_end_where_the_tokens_of_the_whole_text_have_no_edge():
    tokenizer = byte_tokenizer(SCHEMA.special_tokens(), merged=["京駅"])
    assert len(tokenizer.encode("京駅")) == 1
    assert said("東京駅", tokenizer=tokenizer) == {" 東", " 京", " 駅", " 東京", " 京駅", " 東京駅"}


@pytest.mark.parametrize("word", ["दिल्ली", "cafe\u0301", "ไม้"])
def test_vowel_signs_and_accents_belong_to_their_letter(word):
    assert said(f"{word}!") == {f" {word}"}


def test_no_character_comes_out_in_part():
    assert said("Århus") == {" Århus"}
    assert said("é") == {" é"}


def test_only_the_last_message_of_the_user_counts():
    conversation = [*prompt("to Rome"), *ids("<|chat|>", "<|say|>", "No.", "<|end|>"), *prompt("to Bonn")]
    assert GRAMMAR.user_text(conversation) == "to Bonn"
    assert GRAMMAR.user_text(TOKENIZER.encode("no tokens of the form")) == "no tokens of the form"
    assert GRAMMAR.user_text([]) == ""


def test_special_tokens_that_a_user_writes_are_words():
    assert GRAMMAR.user_text(prompt("<|user|> x <|reply|>")) == "<|user|> x <|reply|>"
    assert said("<|say|> x") == {" say", " say|> x", " x"}


@pytest.mark.parametrize("text", ["", "?!", "😀 …", " \n"])
def test_where_no_word_was_said_only_what_needs_none_can_be_asked_for(text):
    allowed = state(text, *ids("<|command|>")).allowed()
    assert allowed is not None
    assert not allowed & set(ids("<|action go.to|>"))
    assert allowed >= set(ids("<|action trunk.open|>", "<|action play|>"))
    assert state(text, *ids("<|command|>", "<|action play|>")).allowed() == set(ids("<|slot station|>"))


@pytest.mark.parametrize("actions", [[], [GO]])
def test_where_nothing_can_be_asked_for_there_is_no_command(actions):
    grammar = DomainGrammar(domain(*actions), TOKENIZER)
    assert state("!", grammar=grammar).allowed() == set(ids("<|fact|>", "<|refusal|>", "<|chat|>"))


@settings(deadline=None)
@given(TEXTS, st.integers(1, 4))
def test_what_can_come_out_was_said(text, max_words):
    found = said(text, max_words)
    for value in found:
        assert value[0] == " "
        assert value[1:] in text
        assert value[1].isalnum() or value[1] == "_"
        assert sum(any(c.isalnum() or c == "_" for c in word) for word in value.split()) <= max_words
    # And every word that is written by itself can.
    assert {" " + word for word in text.split() if word.isascii() and word.isalnum()} <= found


# --- any walk ------------------------------------------------------------------------------------------------------


def walk(random, text: str, grammar: DomainGrammar = GRAMMAR) -> list[int]:
    """Some answer that the grammar lets through, up to its text."""
    found = GrammarState(grammar, prompt(text, grammar.tokenizer))
    written: list[int] = []
    while (allowed := found.allowed()) is not None:
        assert allowed, f"nothing may follow {grammar.tokenizer.decode(written)!r}"
        written.append(random.choice(sorted(allowed)))
        found.advance(written[-1])
    return written


@settings(deadline=None)
@given(st.randoms(use_true_random=False), TEXTS)
def test_any_walk_ends_in_an_answer_that_the_schema_allows(random, text):
    written = walk(random, text)
    answer = DomainAnswer(GRAMMAR, lambda: None, StateValues())
    answer.push(written)
    assert answer.dropped_actions == 0
    assert answer.kind == GRAMMAR.kinds[written[0]]
    assert (answer.kind == "command") == bool(answer.actions)
    # What is repeated is done once.
    started = [GRAMMAR.actions[token_id].name for token_id in written if token_id in GRAMMAR.actions]
    assert {call.name for call in answer.actions} == set(started)
    assert len(answer.actions) <= len(started) <= SCHEMA.max_actions
    done = [(call.name, call.slots) for call in answer.actions]
    assert all(call not in done[:index] for index, call in enumerate(done))
    for call in answer.actions:
        action = SCHEMA.action(call.name)
        assert action is not None
        assert is_complete(action, call.slots)
        for name, value in call.slots.items():
            slot = action.slots[name]
            assert allows(slot, value)
            assert not isinstance(slot, TextSlot) or str(value) in text


# --- schema and tokenizer ------------------------------------------------------------------------------------------


def test_a_tokenizer_of_another_bundle_is_refused():
    with pytest.raises(ManifestError, match=r"'<\|reply\|>' is not in tokenizer.json"):
        DomainGrammar(SCHEMA, byte_tokenizer(SPECIAL_TOKENS))


@pytest.mark.parametrize("slot", [IntegerSlot(min=0, max=99_999), NumberSlot(min=0.0, max=99.0, decimals=3)])
def test_too_many_numbers_are_refused(slot):
    schema = domain(Action(name="a", slots={"x": slot}))
    with pytest.raises(ManifestError, match=r"slot a\.x has more than"):
        DomainGrammar(schema, byte_tokenizer(schema.special_tokens()))
