"""A broker that is absent, killed or frozen."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.brokers import Mosquitto, wait_for
from tests.faults.conftest import SLACK_S, WAIT_S
from tests.faults.proxy import Proxy

pytestmark = pytest.mark.broker
ONLINE_WITHIN_S = 5.0
KEEPALIVE_S = 2


def test_a_broker_that_appears_later_sees_the_daemon_within_five_seconds(tmp_path, start_faulty, listen):
    broker = Mosquitto(tmp_path)
    daemon = start_faulty(broker.port)
    daemon.wait_log('"message":"online"')
    refused_at = time.monotonic()
    # Long enough for the back-off to have come to its cap of 4 s: 0.25 + 0.5 + 1 + 2 s.
    wait_for(lambda: time.monotonic() - refused_at > 4.0, WAIT_S)
    assert daemon.log().count("cannot reach the broker") == 1
    with broker:
        appeared_at = time.monotonic()
        client = listen(broker.port)
        client.wait_status("online")
        assert time.monotonic() - appeared_at < ONLINE_WITHIN_S + SLACK_S
        client.answer()


@pytest.mark.parametrize("persistent", [False, True])
def test_a_broker_killed_in_mid_stream_gets_every_terminal_event_when_it_is_back(
    tmp_path, start_faulty, listen, persistent
):
    settings = ("persistence true", f"persistence_location {tmp_path}/", "autosave_interval 1800")
    broker = Mosquitto(tmp_path, *settings if persistent else ())
    with broker, Proxy(broker.port) as link:
        daemon = start_faulty(link.port, "engine.slots=2", slow=0.04)
        client = listen(broker.port)
        client.wait_status("online")
        # One that goes on until after the broker's return, one that ends while it is away, two that wait meanwhile.
        long, short = client.ask("a", max_tokens=90), client.ask("b", max_tokens=20, user="bob")
        waiting = [client.ask("c", user=user) for user in ("cid", "dan")]
        for query_id in (long, short):
            client.running(query_id)
        wait_for(lambda: client.metrics()["gauges"]["queued"] == 2, WAIT_S)
        if persistent:
            os.kill(broker._process.pid, signal.SIGUSR1)  # "save now", mosquitto(8)
            wait_for((tmp_path / "mosquitto.db").exists, WAIT_S)
        broker.kill()
        link.cut(for_good=True)
        daemon.wait_log("lost the connection")
        connections = client.connections
        broker.start()
        client.wait(lambda: client.connections > connections)
        # Nobody misses anything: the daemon is let in after its listener.
        link.heal()
        ids = [long, short, *waiting]
        finals = [client.terminal(query_id) for query_id in ids]
        assert [final["type"] for final in finals] == ["final"] * 4
        assert [final["usage"]["completion_tokens"] for final in finals] == [90, 20, 4, 4]
        client.answer("still subscribed?")
        for query_id in ids:
            events = client.terminals(query_id)
            # Twice is allowed after a lost connection, two different ones are not.
            assert all(event == events[0] for event in events)
            assert len(events) == 1 or persistent


@pytest.mark.parametrize("answering", [False, True])
def test_a_frozen_broker_is_noticed_and_its_return_too(mosquitto, start_faulty, listen, answering):
    daemon = start_faulty(mosquitto.port, f"mqtt.keepalive_s={KEEPALIVE_S}", slow=0.05)
    client = listen(mosquitto.port)
    client.wait_status("online")
    if answering:
        client.running(query_id := client.ask("on", max_tokens=110))
    os.kill(mosquitto._process.pid, signal.SIGSTOP)
    frozen_at = time.monotonic()
    daemon.wait_log("lost the connection")
    noticed_s = time.monotonic() - frozen_at
    os.kill(mosquitto._process.pid, signal.SIGCONT)
    assert noticed_s < 2 * KEEPALIVE_S + 2 + SLACK_S
    assert client.answer("back again?")["usage"]["completion_tokens"] == 4
    if answering:
        assert client.terminal(query_id)["usage"]["completion_tokens"] == 110
