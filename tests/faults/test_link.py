"""Links that are slow, cut, half-open or reset, and clients that stop reading or vanish."""

from __future__ import annotations

import socket
import threading
import time

import pytest
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion

from tests.brokers import wait_for
from tests.faults.conftest import SLACK_S, WAIT_S

pytestmark = pytest.mark.broker
# What one answer of four tokens may take while others have trouble; alone it takes some 30 ms.
ANSWER_WITHIN_S = 2.0
GROWTH_BYTES = 48 << 20
KEEPALIVE_S = 2
FAULTS = ("slow", "cut", "half-open", "reset")


def spoil(proxy, fault: str, ended: threading.Event) -> None:
    """Give a link its fault until the test ends; cuts and resets come again and again."""
    if fault == "slow":
        proxy.delay_s, proxy.bytes_per_s = 0.05, 2000.0
    elif fault == "half-open":
        proxy.half_open()
    while not ended.wait(0.3):
        if fault == "cut":
            proxy.cut()
        elif fault == "reset":
            proxy.reset()


@pytest.fixture
def spoiled():
    """Begins a fault; it ends with the test, or when the returned function is called."""
    ended = threading.Event()
    threads: list[threading.Thread] = []

    def begin(proxy, fault):
        thread = threading.Thread(target=spoil, args=(proxy, fault, ended))
        threads.append(thread)
        thread.start()

        def end():
            ended.set()
            thread.join()
            proxy.heal()

        return end

    yield begin
    ended.set()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_client_on_a_bad_link_is_no_trouble_to_one_on_a_good_link(
    mosquitto, proxy, start_faulty, listen, spoiled, fault
):
    daemon = start_faulty(mosquitto.port, slow=0.002)
    good = listen(mosquitto.port)
    good.wait_status("online")
    bad = listen(proxy.port, "edge_llm/v1/edge/reply/bad/#")
    good.answer()
    before_bytes = daemon.anonymous_bytes()
    sent = [bad.ask(f"question {number}", user="bad", max_tokens=60) for number in range(4)]
    end = spoiled(proxy, fault)
    sent += [bad.ask(f"question {number}", user="bad", max_tokens=60) for number in range(4, 8)]
    for _ in range(10):
        asked_at = time.monotonic()
        good.answer("am I heard?", timeout_s=ANSWER_WITHIN_S + SLACK_S)
        assert time.monotonic() - asked_at < ANSWER_WITHIN_S + SLACK_S
    assert daemon.anonymous_bytes() - before_bytes < GROWTH_BYTES
    end()
    # Whatever has reached the daemon has got its terminal event, as the listener on the good link sees.
    for query_id in sent:
        good.terminal(query_id)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_daemon_on_a_bad_link_goes_on_and_answers_when_it_is_good_again(
    mosquitto, proxy, start_faulty, listen, spoiled, fault
):
    daemon = start_faulty(
        proxy.port, f"mqtt.keepalive_s={KEEPALIVE_S}", "mqtt.reconnect_max_s=0.5", "mqtt.max_outgoing=50"
    )
    client = listen(mosquitto.port)
    client.wait_status("online")
    client.answer()
    before_bytes = daemon.anonymous_bytes()
    first = [client.ask(f"question {number}", user=f"u{number}", max_tokens=150) for number in range(4)]
    for query_id in first:
        client.running(query_id)
    spoiled_at = time.monotonic()
    end = spoiled(proxy, fault)
    later = [client.ask(f"question {number}", user=f"u{number}", max_tokens=40) for number in range(8)]
    if fault == "half-open":
        daemon.wait_log("lost the connection")
        assert time.monotonic() - spoiled_at < 2 * KEEPALIVE_S + 2 + SLACK_S
    else:
        wait_for(lambda: time.monotonic() - spoiled_at > 1.5, WAIT_S)
    assert daemon.anonymous_bytes() - before_bytes < GROWTH_BYTES
    end()
    for query_id in [*first, *later]:
        assert client.terminal(query_id)["type"] == "final"
    client.answer("good again?")
    for query_id in [*first, *later]:
        events = client.terminals(query_id)
        assert all(event == events[0] for event in events)
    report = client.metrics()
    assert report["gauges"]["outgoing_waiting"] <= 1  # the report itself
    assert report.get("internal_errors", 0) == 0


def test_a_subscriber_that_stops_reading_holds_nobody_up(mosquitto, start_faulty, listen):
    daemon = start_faulty(mosquitto.port)
    good = listen(mosquitto.port)
    good.wait_status("online")
    before_bytes = daemon.anonymous_bytes()
    # Its window holds a few answers; then the broker's writes to it block.
    deaf = Client(CallbackAPIVersion.VERSION2)
    deaf.on_socket_open = lambda _client, _data, sock: sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    subscribed: list[bool] = []
    deaf.on_connect = lambda client, *_: client.subscribe("edge_llm/v1/edge/#", 1)
    deaf.on_subscribe = lambda *_: subscribed.append(True)
    deaf.connect("127.0.0.1", mosquitto.port, keepalive=600)
    wait_for(lambda: deaf.loop(0.1) == 0 and bool(subscribed), WAIT_S)
    # More than the kernel holds back for it, so that the broker's own writes to it come to nothing.
    for _ in range(500):
        good.client.publish("edge_llm/v1/edge/noise", bytes(16_384))
    for number in range(20):
        asked_at = time.monotonic()
        good.answer(f"question {number}", max_tokens=60)
        assert time.monotonic() - asked_at < ANSWER_WITHIN_S + SLACK_S
    assert daemon.anonymous_bytes() - before_bytes < GROWTH_BYTES
    deaf.disconnect()


@pytest.mark.parametrize("limit", ["deadline", "expiry"])
def test_a_client_that_vanishes_keeps_its_slot_only_until_its_time_is_up(mosquitto, proxy, start_faulty, listen, limit):
    start_faulty(mosquitto.port, "engine.slots=1", slow=0.05)
    good = listen(mosquitto.port)
    good.wait_status("online")
    gone = listen(proxy.port)
    limits = {"deadline_ms": 1500} if limit == "deadline" else {"properties": {"MessageExpiryInterval": 1}}
    asked_at = time.monotonic()
    lost = gone.ask("go on", user="bob", max_tokens=200, **limits)
    good.running(lost)
    proxy.cut(for_good=True)
    final = good.answer("next")
    # Alone, the lost one would have taken 10 s.
    assert time.monotonic() - asked_at < 3.0 + SLACK_S
    assert final["usage"]["completion_tokens"] == 4
    (end,) = good.terminals(lost)
    assert end["finish_reason"] == "deadline"
    gauges = good.metrics()["gauges"]
    assert (gauges["active"], gauges["queued"]) == (0, 0)
