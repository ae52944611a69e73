"""What is remembered of queries, and for how long."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from edge_llm.mqtt.acks import Delivery
from edge_llm.mqtt.dedupe import DedupeTable, MadeIds, body_hash
from edge_llm.mqtt.messages import Incoming

BODY = body_hash(b"x")


def reply(size: int = 10) -> Any:
    return SimpleNamespace(terminal_bytes=size)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_running_queries_stay_and_finished_ones_expire():
    clock = Clock()
    table = DedupeTable(10.0, clock=clock)
    table.add(("ann", "q"), BODY, reply())
    clock.now = 100.0
    assert table.find(("ann", "q")) is not None
    assert table.find(("bob", "q")) is None
    table.finish(("ann", "q"), keep=True)
    clock.now = 109.9
    seen = table.find(("ann", "q"))
    assert seen is not None
    assert (seen.body, seen.finished_at) == (BODY, 100.0)
    clock.now = 110.0
    assert table.find(("ann", "q")) is None
    assert len(table) == 0


def test_what_may_be_retried_is_forgotten():
    table = DedupeTable(10.0)
    table.add(("ann", "q"), BODY, reply())
    table.finish(("ann", "q"), keep=False)
    assert table.find(("ann", "q")) is None


def test_bounds_on_count_and_bytes():
    table = DedupeTable(10.0, max_finished=5, max_finished_bytes=1000)
    for n in range(20):
        table.add(("ann", str(n)), BODY, reply())
        table.finish(("ann", str(n)), keep=True)
    assert len(table) == 5
    assert table.find(("ann", "15")) is not None
    table.add(("ann", "big"), BODY, reply(990))
    table.finish(("ann", "big"), keep=True)
    assert len(table) == 2
    table.add(("ann", "bigger"), BODY, reply(1001))
    table.finish(("ann", "bigger"), keep=True)
    assert len(table) == 0


def test_a_made_id_is_found_again_by_its_redelivery():
    made_ids = MadeIds()

    def make(connection: int, *, dup: bool = False, body: bytes = b"hi") -> str:
        return made_ids.make(Incoming("t", body, 0.0, qos=1, dup=dup, delivery=Delivery(connection, 1)))

    first, second = make(1), make(1)
    assert first != second
    assert make(2) not in (first, second)  # the same words again, but a query of their own
    assert make(2, dup=True) == first
    assert make(2, dup=True) == second
    assert make(3, dup=True, body=b"other") not in (first, second)
    assert made_ids.make(Incoming("t", b"hi", 0.0)) != made_ids.make(Incoming("t", b"hi", 0.0))
