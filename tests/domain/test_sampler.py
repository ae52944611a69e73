"""Kind and actions are the most likely that the grammar allows; the text is sampled as the query asks."""

from __future__ import annotations

import numpy as np
import pytest

from edge_llm.domain.sampler import DomainSampler
from edge_llm.engine.sampler import Sampler, SamplingParams
from tests.domain.pack import GRAMMAR, TOKENIZER, answer, greedy_sampler, ids, prompt

HOT = {"temperature": 5.0, "seed": 3}
VOCAB_SIZE = TOKENIZER.vocab_size


def scored(scores: dict[str, float]) -> np.ndarray:
    """A row of logits: zeros, but for these tokens."""
    row = np.zeros(VOCAB_SIZE, np.float32)
    for part, score in scores.items():
        row[ids(part)[0]] = score
    return row


def write(sampler: DomainSampler, *rows: dict[str, float]) -> str:
    """What a sampler chooses, as text with its special tokens."""
    return "".join(name_of(sampler.sample(scored(row))) for row in rows)


def name_of(token_id: int) -> str:
    names = {special: token for token, special in GRAMMAR.ids.items()}
    return names.get(token_id) or TOKENIZER.decode([token_id])


def test_the_most_likely_token_that_is_allowed_is_taken():
    sampler = greedy_sampler("hello")
    assert write(sampler, {"H": 9.0, "<|say|>": 8.0, "<|fact|>": 2.0, "<|chat|>": 1.0}) == "<|fact|>"
    assert write(sampler, {"<|command|>": 9.0}) == "<|say|>"


@pytest.mark.parametrize("params", [{}, HOT, {"temperature": 0.7, "top_k": 3}, {"repetition_penalty": 2.0}])
def test_actions_are_greedy_whatever_the_settings(params):
    rows = [
        {"<|command|>": 0.2, "<|chat|>": 0.1},
        {"<|action volume|>": 0.2, "<|action trunk.open|>": 0.1},
        {"<|slot level|>": 0.2, "<|slot change|>": 0.1},
        {"3": 0.2, "4": 0.1},
        {"0": 0.2, "<|say|>": 0.1},
        {"<|say|>": 0.2},
    ]
    expected = "<|command|><|action volume|><|slot level|>30<|say|>"
    assert write(greedy_sampler("quieter", **params), *rows) == expected


def test_the_text_is_sampled_as_the_query_asks():
    params = SamplingParams(temperature=2.0, seed=11)
    sampler = DomainSampler(GRAMMAR, params, prompt("hi"))
    write(sampler, {"<|chat|>": 9.0}, {"<|say|>": 9.0})
    row = scored({"a": 3.0, "b": 2.5, "c": 2.0})
    # The actions have used nothing of the seed.
    plain = Sampler(params, prompt("hi"))
    assert [sampler.sample(row) for _ in range(20)] == [plain.sample(row) for _ in range(20)]


def test_logits_are_needed_until_the_text_begins():
    sampler = greedy_sampler("hi")
    assert sampler.needs_logits
    write(sampler, {"<|chat|>": 1.0})
    assert sampler.needs_logits
    write(sampler, {"<|say|>": 1.0})
    assert not sampler.needs_logits
    hot = greedy_sampler("hi", **HOT)
    write(hot, {"<|chat|>": 1.0}, {"<|say|>": 1.0})
    assert hot.needs_logits


def test_probabilities_are_those_of_the_model_before_the_grammar():
    sampler = greedy_sampler("open")
    # e^0 each for all but two tokens.
    rest = VOCAB_SIZE - 2
    write(sampler, {"H": np.log(rest), "<|command|>": np.log(2 * rest)})
    write(sampler, {"H": np.log(3 * rest), "<|action trunk.open|>": np.log(rest / 2)})
    write(sampler, {"<|say|>": 0.0})
    write(sampler, {"O": 5.0})
    assert sampler.probabilities == pytest.approx([0.5, 0.5 / 4.5, 1 / VOCAB_SIZE], rel=1e-4)


def test_an_answer_finds_how_sure_the_model_was():
    sampler = greedy_sampler("open")
    rows = [{"<|command|>": 99.0}, {"<|action trunk.open|>": np.log(VOCAB_SIZE - 1)}, {"<|say|>": 99.0}]
    found = answer(sampler)
    found.push([sampler.sample(scored(row)) for row in rows])
    assert found.actions[0].confidence == 0.5


def test_a_copied_word_is_judged_among_those_that_can_be_copied():
    sampler = greedy_sampler("to the coast")
    write(sampler, {"<|command|>": 99.0}, {"<|action go.to|>": 99.0}, {"<|slot place|>": 99.0}, {" ": 1.0, "R": 9.0})
    # "to", "the" or "coast": t twice, c once; that nobody said Rome is known.
    write(sampler, {"R": 9.0, "c": np.log(3), "t": 0.0})
    assert sampler.probabilities[-2:] == pytest.approx([1.0, 0.75])
    write(sampler, {"R": 9.0, "o": 1.0}, {"a": 1.0}, {"s": 1.0}, {"t": 1.0})
    assert sampler.probabilities[-4:] == pytest.approx([1.0] * 4)


def test_extreme_logits_have_a_probability_too():
    sampler = greedy_sampler("hi")
    write(sampler, {"H": 3e38, "<|fact|>": -3e38, "<|command|>": -3e38, "<|refusal|>": -3e38, "<|chat|>": -1e38})
    assert sampler.probabilities == [pytest.approx(0.0)]
    write(sampler, {"<|say|>": 3e38})
    assert sampler.probabilities[1] == pytest.approx(1.0)


def test_logits_are_left_as_they_were():
    row = scored({"H": 2.0, "<|chat|>": 1.0})
    before = row.copy()
    greedy_sampler("hi").sample(row)
    assert (row == before).all()


def test_only_what_was_said_can_be_chosen_however_sure_the_model_is():
    sampler = greedy_sampler("to the coast")
    rows = [{"<|command|>": 1.0}, {"<|action go.to|>": 1.0}, {"<|slot place|>": 1.0}]
    rows += [{letter: 9.0, "<|say|>": 1.0, "c": 0.1} for letter in " Roman"]
    assert write(sampler, *rows) == "<|command|><|action go.to|><|slot place|> coast"


def test_unconstrained_it_writes_what_it_likes():
    sampler = greedy_sampler("hello", constrained=False)
    rows = [
        {"<|command|>": 1.0},
        {"<|action climate.set|>": 1.0},
        {"<|slot degrees|>": 1.0},
        {"9": 1.0},
        {"<|say|>": 2.0},
    ]
    assert write(sampler, *rows) == "<|command|><|action climate.set|><|slot degrees|>9<|say|>"
    assert len(sampler.probabilities) == 4
    assert not sampler.needs_logits


def test_unconstrained_it_is_followed_as_long_as_it_keeps_the_form():
    sampler = greedy_sampler("hello", constrained=False, **HOT)
    rows = [{"<|command|>": 0.1}, {"<|action trunk.open|>": 0.1}, {"<|say|>": 0.1}]
    assert write(sampler, *rows) == "<|command|><|action trunk.open|><|say|>"
    assert len(sampler.probabilities) == 3
