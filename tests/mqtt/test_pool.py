"""A pool: queries are shared among its devices, cancels reach whoever has the query."""

from __future__ import annotations

import contextlib

import pytest

from edge_llm.config import MqttConfig
from edge_llm.mqtt.asking import Asker
from tests.mqtt.fakes import WAIT_S, FakeScheduler, RunningGateway, Wire

pytestmark = pytest.mark.broker


@pytest.fixture
def pool(mosquitto):
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(RunningGateway(mosquitto.port, node=f"kiosk-{n}", pool="hall")) for n in range(3)]


def _owner(pool, user, query_id) -> FakeScheduler:
    return next(device.scheduler for device in pool if (user, query_id) in device.scheduler._running)


def test_queries_are_shared_and_answered_once(mosquitto, pool):
    with Wire(mosquitto.port) as wire:
        for n in range(12):
            wire.send("pool/hall/query/ann", {"id": f"q{n}", "text": f"say number {n}"})
        answers = [wire.terminal(f"q{n}") for n in range(12)]
        assert [answer["text"] for answer in answers] == [f"number {n}" for n in range(12)]
        assert {answer["topic"] for answer in answers} == {"pool/hall/reply/ann/default"}
        assert {answer["node"] for answer in answers} == {"kiosk-0", "kiosk-1", "kiosk-2"}
        assert sum(device.scheduler.count for device in pool) == 12


def test_a_cancel_reaches_the_owner_and_nobody_else_answers(mosquitto, pool):
    with Wire(mosquitto.port) as wire:
        for n in range(3):
            wire.send("pool/hall/query/ann", {"id": f"q{n}", "text": "wait"})
        for device in pool:
            device.scheduler.next()
        wire.send("pool/hall/cancel/ann", {"id": "q1"})
        assert wire.terminal()["id"] == "q1"
        wire.send("pool/hall/cancel/ann", {"id": "never-asked"})
        for device in pool:
            while device.scheduler.cancelled.get(timeout=WAIT_S) != ("ann", "never-asked"):
                pass
        for query_id in ("q0", "q2"):
            _owner(pool, "ann", query_id).finish("ann", query_id)
            assert wire.terminal()["id"] == query_id


def test_superseding_another_devices_query(mosquitto, pool):
    with Wire(mosquitto.port) as wire:
        for n in range(3):
            wire.send("pool/hall/query/ann", {"id": f"q{n}", "text": "wait"})
        for device in pool:
            device.scheduler.next()
        wire.send("pool/hall/query/ann", {"id": "new", "text": "say instead", "supersedes": "q2"})
        ended = {event["id"]: event for event in (wire.terminal(), wire.terminal())}
        assert ended["q2"]["finish_reason"] == "cancelled"
        assert ended["new"]["text"] == "instead"


def test_replies_of_the_pool_stay_with_the_pool(mosquitto, pool):
    with Wire(mosquitto.port) as wire:
        wire.send("pool/hall/query/ann", {"id": "q", "text": "hi", "reply_to": "edge_llm/v1/kiosk-0/reply/ann/x"})
        event = wire.terminal("q")
        assert (event["code"], event["topic"]) == (403, "pool/hall/reply/ann/default")


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_asking_a_pool(mosquitto, pool, protocol):
    with Asker(MqttConfig(port=mosquitto.port, protocol=protocol), user="ann", pool="hall") as asker:
        asker.wait_online(WAIT_S)
        assert asker.ask("say hi", timeout_s=WAIT_S)["text"] == "hi"
