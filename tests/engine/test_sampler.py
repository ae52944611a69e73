from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_llm.engine.sampler import Sampler, SamplingParams

LOGITS = np.log(np.array([0.5, 0.25, 0.15, 0.07, 0.03], np.float32))


def draw(params: SamplingParams, logits=LOGITS, count: int = 4000) -> Counter[int]:
    sampler = Sampler(params, [])
    return Counter(sampler.sample(logits) for _ in range(count))


def test_greedy_takes_the_most_likely():
    assert set(draw(SamplingParams(), count=5)) == {0}


def test_temperature_one_follows_the_distribution():
    counts = draw(SamplingParams(temperature=1.0, seed=1), count=20_000)
    frequencies = [counts[index] / 20_000 for index in range(5)]
    assert frequencies == pytest.approx([0.5, 0.25, 0.15, 0.07, 0.03], abs=0.015)


def test_low_temperature_sharpens():
    assert draw(SamplingParams(temperature=0.25, seed=1))[0] > 3600


@pytest.mark.parametrize(
    ("params", "possible"),
    [
        (SamplingParams(temperature=1.0, seed=1, top_k=2), {0, 1}),
        (SamplingParams(temperature=1.0, seed=1, top_k=1), {0}),
        (SamplingParams(temperature=1.0, seed=1, top_p=0.5), {0}),
        (SamplingParams(temperature=1.0, seed=1, top_p=0.7), {0, 1}),
        (SamplingParams(temperature=1.0, seed=1, top_p=0.9), {0, 1, 2}),
        (SamplingParams(temperature=1.0, seed=1, min_p=0.29), {0, 1, 2}),
        (SamplingParams(temperature=1.0, seed=1, top_k=4, top_p=0.8, min_p=0.2), {0, 1}),
    ],
)
def test_filters_leave_exactly_the_tokens_they_should(params, possible):
    assert set(draw(params)) == possible


def test_same_seed_same_tokens_other_seed_others():
    logits = np.zeros(1000, np.float32)

    def tokens(seed):
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), [])
        return [sampler.sample(logits) for _ in range(20)]

    assert tokens(7) == tokens(7)
    assert tokens(7) != tokens(8)


def test_repetition_penalty_covers_prompt_and_answer():
    logits = np.array([1.0, 0.9, 0.8, -1.0], np.float32)
    sampler = Sampler(SamplingParams(repetition_penalty=2.0), [0])
    # CTRL: positive logits are divided, negative ones multiplied.
    assert [sampler.sample(logits) for _ in range(3)] == [1, 2, 0]
    assert logits.tolist() == pytest.approx([1.0, 0.9, 0.8, -1.0])


def test_negative_logits_are_pushed_down_not_up():
    logits = np.array([-1.0, -1.5], np.float32)
    assert Sampler(SamplingParams(repetition_penalty=2.0), [0]).sample(logits) == 1


def test_the_coldest_temperature_is_greedy_and_nothing_overflows():
    logits = np.array([80.0, -80.0, 79.0], np.float32)
    for temperature in (5e-324, 2.88e-38, 1e-4, 0.01):
        params = SamplingParams(temperature=temperature, min_p=0.5, top_p=0.9, seed=0)
        assert Sampler(params, []).sample(logits) == 0


@given(
    st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=40),
    st.floats(0.01, 5),
    st.integers(0, 50),
    st.floats(0.01, 1),
    st.floats(0, 0.99),
)
def test_any_parameters_choose_a_token_of_the_vocabulary(logits, temperature, top_k, top_p, min_p):
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=0)
    assert 0 <= Sampler(params, []).sample(np.array(logits, np.float32)) < len(logits)
