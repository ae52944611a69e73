"""Connections that are lost: by a broker that dies, a network that is cut, a daemon that crashes."""

from __future__ import annotations

import logging
import re

import pytest

from edge_llm.config import Config, MqttConfig
from edge_llm.metrics import Metrics
from edge_llm.mqtt.gateway import Gateway
from tests.brokers import IotCore, Mosquitto, free_port, wait_for
from tests.mqtt.fakes import WAIT_S, FakeScheduler, Relay, RunningGateway, Wire

pytestmark = pytest.mark.broker
BOTH = pytest.mark.parametrize("protocol", ["5", "3.1.1"])


@pytest.fixture
def relay(mosquitto):
    relay = Relay(mosquitto.port)
    yield relay
    relay.close()


def _connections(running: RunningGateway, count: int) -> None:
    wait_for(lambda: running.metrics.counter("connections") >= count, WAIT_S)


@BOTH
def test_a_cut_connection_costs_no_query(mosquitto, relay, protocol):
    with RunningGateway(relay.port, protocol=protocol) as running, Wire(mosquitto.port, protocol) as wire:
        wire.ask({"id": "named", "text": "wait"})
        wire.ask({"text": "wait without an id"})
        named, made = running.scheduler.next(), running.scheduler.next()
        relay.cut()
        _connections(running, 2)
        running.scheduler.finish("ann", named.id)
        running.scheduler.finish("ann", made.id)
        assert wire.terminal("named")["type"] == "final"
        assert wire.terminal(made.id)["type"] == "final"
        assert [event for event in wire.nothing_more_than() if event["type"] != "delta"] == []
        # Both were delivered twice and ran once (the third is the barrier).
        assert running.scheduler.count == 3
        assert running.metrics.counter("queries_repeated") == 2
        # And both deliveries of the new connection were acknowledged, in order.
        log = mosquitto.log()
        redelivered = re.findall(r"Sending PUBLISH to edge_llm-edge \(d1, q1, r0, m(\d+)", log)
        assert len(redelivered) == 2
        puback = re.compile(r"Received PUBACK from edge_llm-edge \(Mid: (\d+)")
        wait_for(lambda: len(puback.findall(mosquitto.log())) == 3, WAIT_S)
        assert puback.findall(mosquitto.log())[:2] == redelivered


@BOTH
def test_answers_that_end_while_cut_off_arrive_afterwards(mosquitto, relay, protocol):
    with RunningGateway(relay.port, protocol=protocol) as running, Wire(mosquitto.port, protocol) as wire:
        wire.ask({"id": "q", "text": "wait piece"})
        running.scheduler.next()
        wire.find(lambda m: b'"delta"' in m.payload)
        relay.cut(for_good=True)
        wait_for(lambda: not running.gateway.link.connected, WAIT_S)
        running.scheduler.finish("ann", "q")
        wait_for(lambda: running.gateway.link.backlog == 1, WAIT_S)
        relay.allow()
        assert wire.terminal("q")["seq"] == 1
        assert wire.nothing_more_than() == []


@BOTH
def test_an_old_connections_acknowledgement_is_not_sent_on_the_new_one(mosquitto, relay, protocol):
    # The query is answered while the link is down and its session is gone: packet ids start again from 1.
    settings = {"session_expiry_s": 0, "protocol": protocol}
    with RunningGateway(relay.port, **settings) as running, Wire(mosquitto.port, protocol) as wire:
        wire.ask({"id": "old", "text": "wait"})
        running.scheduler.next()
        relay.cut()
        _connections(running, 2)
        wire.ask({"id": "new", "text": "wait"})
        running.scheduler.next()
        running.scheduler.finish("ann", "old")
        wire.terminal("old")
        wire.nothing_more_than()
        assert "Received PUBACK from edge_llm-edge" not in mosquitto.log()
        running.scheduler.finish("ann", "new")
        wire.terminal("new")


@BOTH
def test_a_broker_that_is_killed_and_comes_back(mosquitto, protocol):
    with RunningGateway(mosquitto.port, protocol=protocol) as running:
        with Wire(mosquitto.port, protocol) as wire:
            wire.ask({"id": "q", "text": "wait"})
            running.scheduler.next()
        mosquitto.kill()
        wait_for(lambda: not running.gateway.link.connected, WAIT_S)
        running.scheduler.finish("ann", "q")
        mosquitto.start()
        with Wire(mosquitto.port, protocol, topics=("edge_llm/v1/edge/status",)) as wire:
            assert wire.status("online")
        _connections(running, 2)
        with Wire(mosquitto.port, protocol) as wire:
            wire.ask({"id": "next", "text": "say still here"})
            assert wire.terminal("next")["text"] == "still here"


def test_a_query_in_progress_survives_a_broker_with_persistence(tmp_path):
    broker = Mosquitto(tmp_path, "persistence true", f"persistence_location {tmp_path}/", "autosave_interval 1")
    broker.start()
    try:
        with RunningGateway(broker.port) as running:
            with Wire(broker.port) as wire:
                wire.ask({"id": "q", "text": "wait"})
                running.scheduler.next()
            broker.stop()  # saves its sessions, our unacknowledged query among them
            broker.start()
            _connections(running, 2)
            with Wire(broker.port) as wire:
                wait_for(lambda: running.metrics.counter("queries_repeated") == 1, WAIT_S)
                running.scheduler.finish("ann", "q")
                assert wire.terminal("q")["type"] == "final"
            assert running.scheduler.count == 1
    finally:
        broker.stop()


@BOTH
def test_a_crashed_daemons_query_is_answered_by_the_next(mosquitto, relay, protocol):
    with Wire(mosquitto.port, protocol) as wire, RunningGateway(relay.port, protocol=protocol) as crashed:
        wire.ask({"id": "q", "text": "wait"})
        wire.ask({"text": "say that has no id"})
        crashed.scheduler.next()
        wire.terminal()
        relay.cut(for_good=True)
        assert wire.status("offline")  # the last will
        with RunningGateway(mosquitto.port, online=False, protocol=protocol) as restarted:
            # Redelivered queries wait for the model instead of being refused, even one to be cancelled.
            wait_for(lambda: restarted.metrics.counter("query_messages") == 2, WAIT_S)
            assert restarted.scheduler.count == 0
            restarted.gateway.set_state("online")
            assert restarted.scheduler.next().id == "q"
            restarted.scheduler.finish("ann", "q")
            assert wire.terminal("q")["type"] == "final"
            # The second had been answered, but its acknowledgement waited behind the first: it is answered again.
            assert wire.terminal()["text"] == "that has no id"


def test_a_query_that_waits_for_the_model_can_be_cancelled(mosquitto, relay):
    with Wire(mosquitto.port) as wire, RunningGateway(relay.port) as crashed:
        wire.ask({"id": "q", "text": "wait"})
        crashed.scheduler.next()
        relay.cut(for_good=True)
        with RunningGateway(mosquitto.port, online=False) as restarted:
            wait_for(lambda: restarted.metrics.counter("query_messages") == 1, WAIT_S)
            wire.send("edge/cancel/ann", {"id": "q"})
            event = wire.terminal("q")
            assert (event["finish_reason"], event["text"]) == ("cancelled", "")
            restarted.gateway.set_state("online")
            assert restarted.scheduler.count == 0


def test_unanswered_queries_stay_with_the_broker_when_we_close(mosquitto):
    with Wire(mosquitto.port) as wire:
        with RunningGateway(mosquitto.port) as first:
            wire.ask({"id": "q", "text": "wait"})
            first.scheduler.next()
        assert wire.status("offline")
        with RunningGateway(mosquitto.port) as second:
            assert second.scheduler.next().id == "q"
            second.scheduler.finish("ann", "q")
            assert wire.terminal("q")["type"] == "final"


def test_the_first_connection_is_retried_and_logged_once(tmp_path, caplog):
    broker = Mosquitto(tmp_path)
    config = Config(mqtt=MqttConfig(port=broker.port, reconnect_min_s=0.01, reconnect_max_s=0.05))
    gateway = Gateway(config, Metrics())
    with caplog.at_level(logging.WARNING, "edge_llm"):
        gateway.start()
        wait_for(lambda: gateway.link.trouble is not None, WAIT_S)
        assert not gateway.wait_connected(0.3)
        broker.start()
        assert gateway.wait_connected(WAIT_S)
    gateway.close(1.0)
    broker.stop()
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "cannot reach the broker at 127.0.0.1"
    ]


@pytest.mark.parametrize("mqtt5", [True, False])
def test_auto_finds_the_version_that_the_broker_speaks(tmp_path, mqtt5):
    broker = IotCore(tmp_path, mqtt5=mqtt5)
    broker.start()
    try:
        with RunningGateway(broker.port) as running, Wire(broker.port, "5" if mqtt5 else "3.1.1") as wire:
            assert running.gateway.link.protocol == ("5" if mqtt5 else "3.1.1")
            wire.ask({"id": "q", "text": "say hi"})
            assert wire.terminal("q")["text"] == "hi"
            wire.ask({"id": "w", "text": "wait"})
            running.scheduler.next(), running.scheduler.next()
            wire.send("edge/cancel/ann", {"id": "w"})
            assert wire.terminal("w")["finish_reason"] == "cancelled"
    finally:
        broker.stop()


def test_a_second_daemon_of_the_same_name_is_explained(mosquitto):
    with RunningGateway(mosquitto.port) as first, RunningGateway(mosquitto.port):
        wait_for(
            lambda: (
                "needs its own name" in (first.gateway.link.trouble or "") or first.metrics.counter("connections") > 1
            ),
            WAIT_S,
        )
        assert first.metrics.counter("connections_lost") >= 1


def test_closing_without_a_broker_does_not_hang():
    gateway = Gateway(Config(mqtt=MqttConfig(port=free_port())), Metrics())
    gateway.bind(FakeScheduler(), None)  # type: ignore[arg-type]
    gateway.start()
    gateway.close(0.2)
    assert not gateway.link.connected
