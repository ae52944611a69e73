"""The link's own bounds, against servers that misbehave."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading

import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode

from edge_llm.config import MqttConfig
from edge_llm.metrics import Metrics
from edge_llm.mqtt.client import MqttLink
from edge_llm.mqtt.connection import Outgoing, Session
from tests.brokers import Mosquitto, free_port
from tests.mqtt.fakes import WAIT_S, RunningGateway, Wire

CONNACK, SUBACK = b"\x20\x02\x00\x00", b"\x90\x03\x00\x01\x01"


@contextlib.contextmanager
def raw_server(serve):
    """A TCP server that hands each connection to ``serve``."""
    listener = socket.create_server(("127.0.0.1", 0))
    connections: list[socket.socket] = []

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                connections.append(connection)
                serve(connection)

    threading.Thread(target=accept, daemon=True).start()
    yield listener.getsockname()[1]
    listener.close()
    for connection in connections:
        connection.close()


def make_link(port: int, **settings) -> tuple[MqttLink, Metrics]:
    metrics = Metrics()
    config = MqttConfig(
        port=port, **{"protocol": "3.1.1", "reconnect_min_s": 0.01, "reconnect_max_s": 0.05, **settings}
    )
    link = MqttLink(config, Session("test", (("t", 1),)), lambda _: None, lambda: None, metrics)
    return link, metrics


def test_qos_0_is_refused_while_there_is_no_connection():
    link, _ = make_link(free_port())
    assert not link.publish(Outgoing("t", b"x"))
    assert link.publish(Outgoing("t", b"x", qos=1))
    assert link.backlog == 1


def test_a_broker_that_stops_reading_cannot_fill_the_memory():
    def stall(connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.recv(1024)
        connection.sendall(CONNACK + SUBACK)

    with raw_server(stall) as port:
        link, _ = make_link(port, max_outgoing=50)
        link.start()
        assert link.wait_connected(WAIT_S)
        sent = 0
        while link.publish(Outgoing("t", b"x" * 100_000)):
            sent += 1
            assert sent < 10_000
        assert link.backlog <= 50
        assert link.publish(Outgoing("t", b"x", qos=1))  # a terminal event is kept all the same
        link.close(0.1)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\x20\x02\x00\x00\x90\x00",
        b"\x00" * 64,
        b"\xff" * 64,
        b"\x20\x02\x00\x00\x31\xff\xff\xff\xff\x7f",
        b"HTTP/1.1",
    ],
)
def test_a_server_that_talks_nonsense_does_not_end_the_link(answer):
    seen = threading.Semaphore(0)

    def talk(connection: socket.socket) -> None:
        seen.release()
        with contextlib.suppress(OSError):
            connection.recv(1024)
            connection.sendall(answer)
            connection.close()

    for protocol in ("5", "3.1.1", "auto"):
        with raw_server(talk) as port:
            link, _ = make_link(port, protocol=protocol)
            link.start()
            for _ in range(3):  # it comes back again and again
                assert seen.acquire(timeout=WAIT_S)
            link.close(0.5)
            assert not link._thread.is_alive()


def test_a_failing_callback_is_logged_and_survived(mosquitto, caplog):
    def fail() -> None:
        raise RuntimeError("mine")

    metrics = Metrics()
    config = MqttConfig(port=mosquitto.port)
    link = MqttLink(config, Session("test", (("t", 1),)), lambda _: None, fail, metrics)
    with caplog.at_level(logging.ERROR, "edge_llm"):
        link.start()
        done = threading.Event()
        link.publish(Outgoing("t", b"x", qos=1, on_done=lambda _: done.set()))
        assert done.wait(WAIT_S)
    link.close(1.0)
    assert metrics.counter("internal_errors") == 1
    assert "mine" in caplog.text


def test_a_refused_subscription_is_said():
    link, _ = make_link(free_port())
    refused = ReasonCode(PacketTypes.SUBACK, "Not authorized")
    link._handle_subscribe(None, None, 1, [refused], None)  # type: ignore[arg-type]
    assert link.trouble is not None
    assert "refused the subscription to t: Not authorized" in link.trouble


def test_an_answer_larger_than_the_broker_takes_becomes_an_error(tmp_path):
    broker = Mosquitto(tmp_path, "max_packet_size 2000")
    broker.start()
    try:
        with RunningGateway(broker.port) as running, Wire(broker.port) as wire:
            wire.ask({"id": "big", "text": "wait"})
            running.scheduler.next()
            running.scheduler.finish("ann", "big", "x" * 3000)
            event = wire.terminal()
            assert (event["id"], event["code"]) == ("big", 500)
            assert "lower max_tokens" in event["message"]
            wire.ask({"id": "small", "text": "say hi"})
            assert wire.terminal()["id"] == "small"
            assert running.metrics.counter("connections") == 1
    finally:
        broker.stop()


def test_an_answer_that_a_silent_broker_hangs_up_on_becomes_an_error(tmp_path):
    # A 3.1.1 broker does not say what is too large for it.
    broker = Mosquitto(tmp_path, "max_packet_size 2000")
    broker.start()
    try:
        with RunningGateway(broker.port, protocol="3.1.1") as running, Wire(broker.port, "3.1.1") as wire:
            wire.ask({"id": "big", "text": "wait"})
            running.scheduler.next()
            running.scheduler.finish("ann", "big", "x" * 3000)
            event = wire.terminal()
            assert (event["id"], event["code"]) == ("big", 500)
            wire.ask({"id": "small", "text": "say hi"})
            assert wire.terminal()["id"] == "small"
    finally:
        broker.stop()


def test_more_terminal_events_than_the_window_all_arrive(mosquitto):
    with RunningGateway(mosquitto.port, serving={"max_queued": 200}) as running, Wire(mosquitto.port) as wire:
        for n in range(100):
            wire.ask({"id": f"q{n}", "text": "wait"})
        for _ in range(100):
            running.scheduler.next()
        for n in reversed(range(100)):
            running.scheduler.finish("ann", f"q{n}")
        assert {wire.terminal()["id"] for _ in range(100)} == {f"q{n}" for n in range(100)}
