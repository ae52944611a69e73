from __future__ import annotations

import os
import queue
import random
import threading
import time
from dataclasses import replace

import pytest

from edge_llm.bundle.manifest import GenerationDefaults
from edge_llm.config import PowerConfig, ServingConfig
from edge_llm.device.power import PowerMonitor
from edge_llm.device.sensors import SensorThread
from edge_llm.engine.sampler import SamplingParams
from edge_llm.serving.caches import no_caches
from edge_llm.serving.request import Delta, Failed, Final, Message, Request
from edge_llm.serving.scheduler import Scheduler
from tests.fakes import FakeRunner, byte_tokenizer, fake_engine, renderer

TOKENIZER = byte_tokenizer()
RENDERER = renderer(TOKENIZER)
TIMEOUT_S = 20


class Inbox:
    """Collects one request's events."""

    def __init__(self) -> None:
        self.events: queue.Queue = queue.Queue()
        self.deltas: list[str] = []
        self.terminal: list = []
        self.done = threading.Event()

    def __call__(self, event) -> None:
        if isinstance(event, Delta):
            assert not self.terminal, "a delta after the terminal event"
            self.deltas.append(event.text)
        else:
            self.terminal.append(event)
            self.done.set()
        self.events.put(event)

    def wait(self):
        assert self.done.wait(TIMEOUT_S), "no terminal event came"
        return self.terminal[0]


@pytest.fixture
def make_scheduler():
    made = []

    def make(runner: FakeRunner | None = None, **config) -> Scheduler:
        engine = fake_engine(runner or FakeRunner())
        scheduler = Scheduler(engine, TOKENIZER, RENDERER, GenerationDefaults(max_tokens=20), ServingConfig(**config))
        scheduler.start()
        made.append((scheduler, engine))
        return scheduler

    yield make
    for scheduler, engine in made:
        engine.runner.gate.set()
        scheduler.drain(0)
        assert engine.free_slots == engine.runner.cache.slots, "a slot was lost"


def ask(scheduler: Scheduler, text: str = "hello", user: str = "u", name: str = "q", **fields) -> Inbox:
    inbox = Inbox()
    scheduler.submit(Request(user, name, (Message("user", text),), inbox, time.monotonic(), **fields))
    return inbox


def expected(text: str, count: int) -> str:
    token_ids = fake_engine(FakeRunner()).generate(RENDERER.encode([Message("user", text)]), max_tokens=count)
    return TOKENIZER.decode(list(token_ids))


def test_an_answer_streams_and_ends_once(make_scheduler):
    inbox = ask(make_scheduler(), max_tokens=7)
    final = inbox.wait()
    assert final.text == "".join(inbox.deltas) == expected("hello", 7)
    assert final.finish_reason == "length"
    assert final.usage.completion_tokens == 7
    assert final.usage.prompt_tokens == len(RENDERER.encode([Message("user", "hello")]))
    timing = final.timing
    assert 0 <= timing.queue_ms <= timing.total_ms
    assert timing.ttft_ms is not None
    assert timing.queue_ms + timing.prefill_ms <= timing.ttft_ms + 1 <= timing.total_ms + 2


def test_a_stop_token_ends_it(make_scheduler):
    final = ask(make_scheduler(FakeRunner(stop_after=5))).wait()
    assert final.finish_reason == "stop"
    assert 0 < len(final.text) < 20


def test_a_stop_string_ends_it_and_is_cut(make_scheduler):
    text = expected("hello", 20)
    final = ask(make_scheduler(), stop=(text[6:9],)).wait()
    assert final.finish_reason == "stop"
    assert final.text == text[: text.index(text[6:9])]


def test_fifty_queries_of_ten_users_answer_as_alone(make_scheduler):
    scheduler = make_scheduler(max_queued=64, max_queued_per_user=8)
    rng = random.Random(0)
    cases = [(f"u{n % 10}", f"q{n}", f"text {n}" * rng.randint(1, 6), rng.randint(1, 20)) for n in range(50)]
    inboxes = [ask(scheduler, text, user, name, max_tokens=count) for user, name, text, count in cases]
    cancelled = {7, 23, 41}
    for number in cancelled:
        scheduler.cancel(cases[number][0], cases[number][1])
    for number, (inbox, (_, _, text, count)) in enumerate(zip(inboxes, cases, strict=True)):
        final = inbox.wait()
        assert len(inbox.terminal) == 1
        if number in cancelled and final.finish_reason == "cancelled":
            assert expected(text, count).startswith(final.text)
        else:
            assert (final.text, final.finish_reason) == (expected(text, count), "length")


def test_active_queries_decode_in_one_run(make_scheduler):
    runner = FakeRunner(slots=4)
    runner.gate.clear()
    scheduler = make_scheduler(runner)
    inboxes = [ask(scheduler, f"t{n}", f"u{n}", max_tokens=10) for n in range(4)]
    runner.gate.set()
    for inbox in inboxes:
        inbox.wait()
    assert ("decode", 4) in runner.runs


def test_cancel_of_a_waiting_query_hits_only_that(make_scheduler):
    runner = FakeRunner(slots=1)
    runner.gate.clear()
    scheduler = make_scheduler(runner)
    running = ask(scheduler, name="running", max_tokens=5)
    assert runner.entered.wait(TIMEOUT_S)
    waiting = ask(scheduler, name="waiting")
    assert scheduler.cancel("u", "waiting")
    runner.gate.set()
    assert waiting.wait().finish_reason == "cancelled"
    assert waiting.wait().text == ""
    assert running.wait().finish_reason == "length"


def test_cancel_stops_in_the_middle_of_a_prefill(make_scheduler):
    runner = FakeRunner(slots=1)
    runner.gate.clear()
    scheduler = make_scheduler(runner)
    inbox = ask(scheduler, "long " * 40)
    assert runner.entered.wait(TIMEOUT_S)
    assert scheduler.cancel("u", "q")
    runner.gate.set()
    assert inbox.wait().finish_reason == "cancelled"
    assert [kind for kind, _ in runner.runs] == ["prefill"]


def test_cancel_keeps_the_text_so_far(make_scheduler):
    runner = FakeRunner(slots=1)
    scheduler = make_scheduler(runner)
    inbox = ask(scheduler, max_tokens=200)
    inbox.events.get(timeout=TIMEOUT_S)
    scheduler.cancel("u", "q")
    final = inbox.wait()
    assert final.text == "".join(inbox.deltas)
    assert expected("hello", 200).startswith(final.text)


def test_cancel_of_an_unknown_or_anothers_query_is_refused(make_scheduler):
    runner = FakeRunner(slots=1)
    runner.gate.clear()
    scheduler = make_scheduler(runner)
    inbox = ask(scheduler, user="alice", max_tokens=3)
    assert not scheduler.cancel("alice", "other")
    assert not scheduler.cancel("bob", "q")
    runner.gate.set()
    assert inbox.wait().finish_reason == "length"


def test_a_deadline_that_passed_in_the_queue_is_408(make_scheduler):
    runner = FakeRunner(slots=1)
    runner.gate.clear()
    scheduler = make_scheduler(runner)
    ask(scheduler, name="running", max_tokens=3)
    assert runner.entered.wait(TIMEOUT_S)
    late = ask(scheduler, name="late", deadline_at=time.monotonic() - 0.001)
    runner.gate.set()
    failed = late.wait()
    assert isinstance(failed, Failed)
    assert failed.error.code == 408


def test_a_deadline_during_the_answer_keeps_the_text_so_far(make_scheduler):
    runner = FakeRunner(slots=1)
    scheduler = make_scheduler(runner)
    # Gated by hand: one prefill, then the deadline passes while a step waits.
    inbox = Inbox()
    original = runner.decode

    def slow_decode(*args):
        runner.decode = original
        assert passed.wait(TIMEOUT_S)
        return original(*args)

    passed = threading.Event()
    runner.decode = slow_decode
    deadline_at = time.monotonic() + 0.2
    scheduler.submit(
        Request("u", "q", (Message("user", "hi"),), inbox, time.monotonic(), max_tokens=200, deadline_at=deadline_at)
    )
    inbox.events.get(timeout=TIMEOUT_S)
    while time.monotonic() < deadline_at:
        passed.wait(0.01)
    passed.set()
    final = inbox.wait()
    assert final.finish_reason == "deadline"
    assert final.text


def test_a_full_queue_is_429(make_scheduler):
    runner = FakeRunner(slots=1)
    runner.gate.clear()
    scheduler = make_scheduler(runner, max_queued=1)
    first = ask(scheduler, name="running", max_tokens=2)
    assert runner.entered.wait(TIMEOUT_S)
    second = ask(scheduler, name="waiting", max_tokens=2)
    refused = ask(scheduler, name="refused").wait()
    assert refused.error.code == 429
    runner.gate.set()
    assert first.wait().finish_reason == second.wait().finish_reason == "length"


def test_background_leaves_a_slot_to_whoever_speaks(make_scheduler):
    runner = FakeRunner(slots=2)
    runner.gate.clear()
    scheduler = make_scheduler(runner)
    ended: list[str] = []

    def ask_noting(name: str, **fields) -> Inbox:
        inbox = Inbox()

        def note(event) -> None:
            if isinstance(event, Final):
                ended.append(name)
            inbox(event)

        messages = (Message("user", "hello"),)
        scheduler.submit(Request("u", name, messages, note, time.monotonic(), **fields))
        return inbox

    inboxes = [ask_noting(f"b{n}", priority="background", max_tokens=100) for n in range(3)]
    assert runner.entered.wait(TIMEOUT_S)
    inboxes.append(ask_noting("now", max_tokens=2))
    runner.gate.set()
    for inbox in inboxes:
        assert inbox.wait().finish_reason == "length"
    # Without the reserved slot b1 would have taken it, and "now" would come after one of them.
    assert ended == ["now", "b0", "b1", "b2"]


@pytest.mark.parametrize(("text_len", "max_tokens"), [(300, None), (200, 60)])
def test_a_prompt_that_does_not_fit_is_413(make_scheduler, text_len, max_tokens):
    failed = ask(make_scheduler(), "x" * text_len, max_tokens=max_tokens).wait()
    assert failed.error.code == 413
    assert "shorten the text" in failed.error.message


def test_the_default_max_tokens_gives_way_to_a_long_prompt(make_scheduler):
    overhead = len(RENDERER.encode([Message("user", "")]))
    final = ask(make_scheduler(), "x" * (250 - overhead)).wait()
    assert final.usage.prompt_tokens == 250
    assert final.usage.completion_tokens == 6


def test_a_fault_in_a_run_is_500_and_the_next_query_works(make_scheduler):
    runner = FakeRunner()
    scheduler = make_scheduler(runner)
    runner.fail_next = MemoryError("no")
    assert ask(scheduler).wait().error.code == 500
    assert ask(scheduler, name="next", max_tokens=4).wait().text == expected("hello", 4)


def test_a_fault_in_ones_sampling_costs_nobody_else(make_scheduler):
    runner = FakeRunner(slots=2)
    runner.gate.clear()
    scheduler = make_scheduler(runner)

    def broken_logits(row):
        raise IndexError("sampling")

    runner.logits = broken_logits
    good = ask(scheduler, name="good", max_tokens=10)
    bad = ask(scheduler, name="bad", max_tokens=10, sampling=SamplingParams(temperature=1.0))
    runner.gate.set()
    assert bad.wait().error.code == 500
    assert good.wait().text == expected("hello", 10)


def test_a_cancel_that_came_too_late_does_not_meet_a_later_query(make_scheduler):
    runner = FakeRunner(slots=1)
    scheduler = make_scheduler(runner)
    runner.gate.clear()
    runner.fail_next = MemoryError("no")
    first = ask(scheduler)
    assert runner.entered.wait(TIMEOUT_S)
    assert scheduler.cancel("u", "q")
    runner.gate.set()
    assert first.wait().error.code == 500
    assert ask(scheduler, max_tokens=3).wait().finish_reason == "length"


def test_a_fault_of_the_scheduler_itself_is_500_for_all_and_it_lives_on(make_scheduler, monkeypatch):
    scheduler = make_scheduler()
    original = scheduler._admit

    def broken():
        monkeypatch.setattr(scheduler, "_admit", original)
        raise RuntimeError("a bug")

    monkeypatch.setattr(scheduler, "_admit", broken)
    assert ask(scheduler).wait().error.code == 500
    assert ask(scheduler, max_tokens=3).wait().finish_reason == "length"


def test_the_limit_on_max_tokens_holds_for_the_default_too(make_scheduler):
    assert ask(make_scheduler(max_tokens=5)).wait().usage.completion_tokens == 5


def test_a_client_callback_that_raises_does_not_stop_the_engine(make_scheduler):
    scheduler = make_scheduler()

    def broken(event):
        raise RuntimeError("client")

    scheduler.submit(Request("u", "bad", (Message("user", "x"),), broken, time.monotonic(), max_tokens=3))
    assert ask(scheduler, max_tokens=3).wait().finish_reason == "length"


def test_a_session_remembers_and_its_queries_follow_each_other(make_scheduler):
    runner = FakeRunner(stop_after=6)
    scheduler = make_scheduler(runner)
    first = ask(scheduler, "one", name="1", session="s")
    second = ask(scheduler, "two", name="2", session="s")
    answer = first.wait().text
    conversation = [Message("user", "one"), Message("assistant", answer), Message("user", "two")]
    assert second.wait().usage.prompt_tokens == len(RENDERER.encode(conversation))


def test_drain_answers_what_was_accepted_and_refuses_the_rest(make_scheduler):
    runner = FakeRunner(slots=1)
    runner.gate.clear()
    scheduler = make_scheduler(runner)
    accepted = [ask(scheduler, name=f"q{n}", max_tokens=5) for n in range(3)]
    assert runner.entered.wait(TIMEOUT_S)
    drained = []
    drainer = threading.Thread(target=lambda: drained.append(scheduler.drain(TIMEOUT_S)))
    drainer.start()
    while not scheduler._draining:
        time.sleep(0)
    assert ask(scheduler, name="late").wait().error.code == 503
    runner.gate.set()
    drainer.join(TIMEOUT_S)
    assert drained == [True]
    assert all(inbox.wait().finish_reason == "length" for inbox in accepted)


def test_drain_out_of_time_cancels_what_is_left(make_scheduler):
    runner = FakeRunner(slots=1)
    scheduler = make_scheduler(runner)
    runner.gate.clear()
    inboxes = [ask(scheduler, name=f"q{n}", max_tokens=200) for n in range(3)]
    assert runner.entered.wait(TIMEOUT_S)
    opener = threading.Timer(0.2, runner.gate.set)
    opener.start()
    assert scheduler.drain(0.05) is False
    assert [inbox.wait().finish_reason for inbox in inboxes] == ["cancelled"] * 3


def test_sampling_with_a_seed_repeats(make_scheduler):
    scheduler = make_scheduler()
    params = SamplingParams(temperature=1.5, seed=11)
    first = ask(scheduler, name="1", sampling=params).wait()
    second = ask(scheduler, name="2", sampling=params).wait()
    assert isinstance(first, Final)
    assert first.text == second.text


def test_in_the_heat_one_query_at_a_time_gets_a_shorter_answer(tmp_path):
    zone = tmp_path / "sys/class/thermal/thermal_zone0"
    zone.mkdir(parents=True)
    (zone / "temp").write_text("90000")
    power = PowerMonitor(PowerConfig(hot_max_tokens=3), root=tmp_path)
    engine = fake_engine(FakeRunner(slots=4))
    caches = replace(no_caches(engine), power=power)
    scheduler = Scheduler(engine, TOKENIZER, RENDERER, GenerationDefaults(20), ServingConfig(), caches=caches)
    inboxes = [ask(scheduler, name=f"q{number}") for number in range(3)]
    long = ask(scheduler, name="long", max_tokens=9)
    active = []
    while not all(inbox.done.is_set() for inbox in (*inboxes, long)):
        scheduler._step()
        active.append(scheduler.load["active"])
    assert max(active) == 1
    assert [inbox.wait().usage.completion_tokens for inbox in (*inboxes, long)] == [3, 3, 3, 9]


def test_a_sensor_that_hangs_stalls_no_answer(tmp_path):
    zone = tmp_path / "sys/class/thermal/thermal_zone0"
    zone.mkdir(parents=True)
    os.mkfifo(zone / "temp")  # nobody writes to it, so its reader hangs
    sensors = SensorThread()
    power = PowerMonitor(PowerConfig(interval_s=0.001), root=tmp_path, post=sensors.post)
    engine = fake_engine(FakeRunner())
    caches = replace(no_caches(engine), power=power, sensors=sensors)
    scheduler = Scheduler(engine, TOKENIZER, RENDERER, GenerationDefaults(20), ServingConfig(), caches=caches)
    scheduler.start()
    assert [ask(scheduler, name=f"q{number}").wait().usage.completion_tokens for number in range(5)] == [20] * 5
    scheduler.drain(1)
    caches.close()
    with (zone / "temp").open("w") as pipe:  # so that the thread can end
        pipe.write("20000\n")
