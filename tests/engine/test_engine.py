from __future__ import annotations

import pytest

from edge_llm.engine.engine import Engine
from edge_llm.engine.sampler import Sampler, SamplingParams
from edge_llm.errors import ContextOverflowError, NoFreeSlotError
from tests.fakes import STOP_ID, FakeRunner, fake_engine

PROMPTS = [list(range(10)), list(range(37, 0, -1)), [5] * 64, [9, 8, 7, 6, 5]]


def solo(prompt: list[int], count: int = 12) -> list[int]:
    return list(fake_engine(FakeRunner()).generate(prompt, max_tokens=count))


def test_generate_yields_max_tokens_and_frees_the_slot():
    engine = fake_engine(FakeRunner(slots=1))
    assert len(list(engine.generate([1, 2, 3], max_tokens=5))) == 5
    assert engine.free_slots == 1


def test_generate_stops_before_a_stop_token():
    engine = fake_engine(FakeRunner(stop_after=20))
    assert len(list(engine.generate([1] * 16, max_tokens=50))) == 4


def test_a_closed_generator_frees_its_slot():
    engine = fake_engine(FakeRunner(slots=1))
    tokens = engine.generate([1, 2, 3], max_tokens=5)
    next(tokens)
    tokens.close()
    assert engine.free_slots == 1


@pytest.mark.parametrize("chunk", [1, 3, 16, 64, 1000])
def test_the_chunk_size_changes_nothing(chunk):
    expected = solo(PROMPTS[2])
    assert list(fake_engine(FakeRunner(), chunk).generate(PROMPTS[2], max_tokens=12)) == expected


@pytest.mark.parametrize("length", range(2, 70))
def test_no_chunk_is_a_single_token(length):
    runner = FakeRunner()
    list(fake_engine(runner, prefill_chunk=16).generate([1] * length, max_tokens=1))
    chunks = [count for kind, count in runner.runs if kind == "prefill"]
    assert sum(chunks) == length
    assert 2 <= min(chunks) <= max(chunks) <= 16


def test_sequences_that_join_and_leave_answer_as_alone():
    engine = fake_engine(FakeRunner(slots=4))
    limits = [3, 9, 6, 12]
    waiting = [engine.start(prompt, SamplingParams(), limit) for prompt, limit in zip(PROMPTS, limits, strict=True)]
    states = list(waiting)
    running = []
    while waiting or running:
        if waiting:
            engine.prefill(waiting[0])
            if waiting[0].prefilled:
                running.append(waiting.pop(0))
        if running:
            engine.decode(running)
        for state in [state for state in running if state.finished]:
            running.remove(state)
            engine.release(state)
    assert engine.free_slots == 4
    assert [state.output_ids[:3] for state in states] == [solo(prompt, 3) for prompt in PROMPTS]
    assert [state.output_ids for state in states] == [
        solo(prompt, len(state.output_ids)) for prompt, state in zip(PROMPTS, states, strict=True)
    ]


def test_neighbours_run_together_after_one_leaves():
    runner = FakeRunner(slots=4)
    engine = fake_engine(runner, prefill_chunk=100)
    states = [engine.start(prompt, SamplingParams(), 50) for prompt in PROMPTS]
    for state in states:
        engine.prefill(state)
    engine.release(states.pop(1))
    runner.runs.clear()
    engine.decode(states)
    assert runner.runs == [("decode", 3)]
    assert sorted(state.slot for state in states) == [0, 1, 2] or sorted(state.slot for state in states) == [1, 2, 3]
    for state, prompt in zip(states, [PROMPTS[0], PROMPTS[2], PROMPTS[3]], strict=True):
        assert state.output_ids == solo(prompt, 2)


def test_a_row_that_is_being_prefilled_is_not_overwritten():
    runner = FakeRunner(slots=3)
    engine = fake_engine(runner, prefill_chunk=8)
    first, middle, last = (engine.start(prompt, SamplingParams(), 20) for prompt in PROMPTS[:3])
    for state in (first, last):
        while not state.prefilled:
            engine.prefill(state)
    engine.prefill(middle)  # one chunk of five
    engine.decode([first, last])
    while not middle.prefilled:
        engine.prefill(middle)
    engine.decode([first, middle, last])
    assert first.output_ids == solo(PROMPTS[0], 3)
    assert middle.output_ids == solo(PROMPTS[1], 2)
    assert last.output_ids == solo(PROMPTS[2], 3)


def test_the_context_is_used_to_its_last_position():
    engine = fake_engine(FakeRunner(max_seq_len=32))
    assert len(list(engine.generate([1] * 30, max_tokens=3))) == 3
    with pytest.raises(ContextOverflowError, match="30 prompt tokens and max_tokens 4 exceed the context of 32"):
        engine.start([1] * 30, SamplingParams(), 4)


def test_no_free_slot_is_an_error_that_takes_nothing():
    engine = fake_engine(FakeRunner(slots=1))
    engine.start([1], SamplingParams(), 1)
    with pytest.raises(NoFreeSlotError):
        engine.start([1], SamplingParams(), 1)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ContextOverflowError, match="no tokens"):
        fake_engine(FakeRunner()).start([], SamplingParams(), 1)


def test_sampled_decoding_reads_the_rows_of_its_own():
    engine = fake_engine(FakeRunner(slots=2), prefill_chunk=100)
    greedy = engine.start(PROMPTS[0], SamplingParams(), 10)
    sampled = engine.start(PROMPTS[1], SamplingParams(temperature=0.01, seed=3), 10)
    for state in (greedy, sampled):
        engine.prefill(state)
    for _ in range(5):
        engine.decode([greedy, sampled])
    assert greedy.output_ids == solo(PROMPTS[0], 6)
    assert sampled.output_ids == solo(PROMPTS[1], 6)


def test_what_chooses_the_tokens_may_be_made_elsewhere():
    made = []

    class Second(Sampler):
        """Asked for three tokens, and then content with the most likely ones."""

        def __init__(self, params, prompt_ids):
            super().__init__(params, prompt_ids)
            made.append(list(prompt_ids))
            self.asked = 0

        @property
        def needs_logits(self):
            return self.asked < 3

        def sample(self, logits):
            self.asked += 1
            return 1

    engine = Engine(FakeRunner(), [STOP_ID], 16, Second)
    tokens = list(engine.generate(PROMPTS[0], max_tokens=8))
    assert made == [PROMPTS[0]]
    assert tokens[:3] == [1, 1, 1]
    assert 1 not in tokens[3:]
