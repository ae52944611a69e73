"""A provider that fails while it serves: the next one goes on, no text is wrong, and every query ends once."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from edge_llm.bundle.manifest import GenerationDefaults
from edge_llm.config import ServingConfig
from edge_llm.device.providers import ProviderChoice
from edge_llm.engine.loading import LoadedModel
from edge_llm.engine.prompt import Message
from edge_llm.errors import UnsupportedBundleError
from edge_llm.serving.caches import no_caches
from edge_llm.serving.failover import Failover
from edge_llm.serving.request import Delta, Failed, Final, Request
from edge_llm.serving.scheduler import Scheduler
from tests.fakes import FakeRunner, byte_tokenizer, fake_engine, renderer

TOKENIZER = byte_tokenizer()
RENDERER = renderer(TOKENIZER)
GPU_FAULT = RuntimeError("CUDA failure 999: the driver is gone")


class Query:
    def __init__(self) -> None:
        self.text = ""
        self.terminal: list[Final | Failed] = []

    def __call__(self, event) -> None:
        assert not self.terminal
        if isinstance(event, Delta):
            self.text += event.text
        else:
            self.terminal.append(event)


class Bench:
    """A scheduler on a runner that can fail, stepped by hand."""

    def __init__(self, fall_back=None) -> None:
        self.gpu, self.cpu = FakeRunner(slots=2), FakeRunner(slots=2)
        engine = fake_engine(self.gpu)
        gpu = ProviderChoice("CUDAExecutionProvider", "cuda")
        self.found = LoadedModel(
            None,
            fake_engine(self.cpu),
            TOKENIZER,
            RENDERER,
            ProviderChoice("CPUExecutionProvider", "cpu-int8"),
            False,
            0,
        )
        model = replace(self.found, engine=engine, provider=gpu, fall_back=fall_back or (lambda: self.found))
        caches = no_caches(engine)
        self.told: list[str] = []
        self.scheduler = Scheduler(engine, TOKENIZER, RENDERER, GenerationDefaults(8), ServingConfig(), caches=caches)
        self.scheduler._running.failover = Failover(model, caches, lambda found: self.told.append(found.provider.name))

    def ask(self, text: str, name: str) -> Query:
        query = Query()
        self.scheduler.submit(Request("ann", name, (Message("user", text),), query, time.monotonic()))
        return query

    def run(self, *queries: Query) -> None:
        for _ in range(100):
            if all(query.terminal for query in queries):
                return
            self.scheduler._step()
        pytest.fail("a query got no terminal event")


def expected(text: str) -> str:
    ids = fake_engine(FakeRunner()).generate(RENDERER.encode([Message("user", text)]), max_tokens=8)
    return TOKENIZER.decode(list(ids))


def test_a_query_that_has_said_nothing_yet_is_answered_by_the_next_provider():
    bench = Bench()
    bench.gpu.fail_next = GPU_FAULT
    running, waiting = bench.ask("how far is it", "a"), bench.ask("and where is it", "b")
    bench.run(running, waiting)
    for query, text in ((running, "how far is it"), (waiting, "and where is it")):
        (final,) = query.terminal
        assert isinstance(final, Final)
        assert final.text == query.text == expected(text)
    assert bench.told == ["CPUExecutionProvider"]


def test_an_answer_that_has_begun_ends_with_503_and_later_queries_are_answered():
    bench = Bench()
    running = bench.ask("how far is it", "a")
    while not running.text:
        bench.scheduler._step()
    bench.gpu.fail_next = GPU_FAULT
    later = bench.ask("where", "b")
    bench.run(running, later)
    (failed,) = running.terminal
    assert isinstance(failed, Failed)
    assert (failed.error.code, failed.error.retriable) == (503, True)
    assert expected("how far is it").startswith(running.text)
    assert later.terminal[0].text == expected("where")


def test_it_falls_back_once():
    bench = Bench()
    bench.gpu.fail_next = GPU_FAULT
    first = bench.ask("how far is it", "a")
    bench.run(first)
    bench.cpu.fail_next = GPU_FAULT
    second, third = bench.ask("where", "b"), None
    bench.run(second)
    assert second.terminal[0].error.code == 500
    third = bench.ask("when", "c")
    bench.run(third)
    assert third.terminal[0].text == expected("when")
    assert bench.told == ["CPUExecutionProvider"]


def test_without_another_provider_the_query_fails_and_the_next_is_tried():
    def nothing():
        raise UnsupportedBundleError("no execution provider can serve this bundle")

    bench = Bench(nothing)
    bench.gpu.fail_next = GPU_FAULT
    first = bench.ask("how far is it", "a")
    bench.run(first)
    assert first.terminal[0].error.code == 500
    second = bench.ask("where", "b")
    bench.run(second)
    assert second.terminal[0].text == expected("where")
    assert bench.told == []
    assert bench.scheduler.load["active"] == 0


def test_the_watchdog_waits_while_the_next_provider_is_loaded_and_no_longer():
    excused: list[bool] = []

    def load():
        heartbeat = bench.scheduler.heartbeat
        excused.append(heartbeat.has_moved(since=heartbeat.count))
        return bench.found

    bench = Bench(load)
    bench.gpu.fail_next = GPU_FAULT
    bench.run(bench.ask("how far is it", "a"))
    assert excused == [True]
    heartbeat = bench.scheduler.heartbeat
    heartbeat.beat()
    assert not heartbeat.has_moved(since=heartbeat.count)
