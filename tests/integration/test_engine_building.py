"""While a provider compiles, which can take minutes, the retained status and systemd are told how far it is."""

from __future__ import annotations

import json
import queue
import sys

import pytest
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion

from tests.integration.conftest import Daemon
from tests.paths import TINY_BUNDLE
from tests.systemd.manager import FakeManager

pytestmark = pytest.mark.broker
WAIT_S = 120
TENSORRT = "TensorrtExecutionProvider"
SETTINGS = (
    f'engine.providers=["{TENSORRT}", "CPUExecutionProvider"]',
    f'engine.targets={{{TENSORRT} = ["cpu-int8"], CPUExecutionProvider = ["cpu-int8"]}}',
)


class BuildingDaemon(Daemon):
    """A daemon whose TensorRT compiles for as long as a file is there."""

    def __init__(self, port, folder):
        super().__init__(TINY_BUNDLE, port, folder, *SETTINGS)
        self._command[:3] = [sys.executable, "-m", "tests.integration.building_daemon"]


@pytest.fixture
def manager(tmp_path, monkeypatch):
    with FakeManager(tmp_path) as manager:
        yield manager


@pytest.fixture
def statuses(mosquitto):
    """Every status that is published."""
    heard = queue.Queue()
    client = Client(CallbackAPIVersion.VERSION2)
    client.on_connect = lambda *_: client.subscribe("edge_llm/v1/edge/status", qos=1)
    client.on_message = lambda _client, _data, message: heard.put(json.loads(message.payload))
    client.connect("127.0.0.1", mosquitto.port)
    client.loop_start()
    yield heard
    client.disconnect()
    client.loop_stop()


def until(statuses, state):
    seen = []
    while not seen or seen[-1]["state"] != state:
        seen.append(statuses.get(timeout=WAIT_S))
    return seen


def test_a_slow_build_is_never_silent(mosquitto, manager, statuses, connect, tmp_path, monkeypatch):
    hold = tmp_path / "hold"
    hold.touch()
    # The broker is there already: it would tell the manager that it is ready, too.
    monkeypatch.setenv("NOTIFY_SOCKET", manager.address)
    monkeypatch.setenv("HOLD_BUILD", str(hold))
    daemon = BuildingDaemon(mosquitto.port, tmp_path).start()
    try:
        told = [until(statuses, "preparing")[-1]]
        told += [statuses.get(timeout=WAIT_S) for _ in range(3)]
        for status in told:
            assert (status["state"], status["bundle"], status["provider"]) == ("preparing", "tiny", TENSORRT)
            assert (status["engines"], status["graphs"]) == (0, 1)
        elapsed_s = [status["elapsed_s"] for status in told]
        assert elapsed_s == sorted(set(elapsed_s))
        hold.unlink()
        online = until(statuses, "online")[-1]
        assert not {"elapsed_s", "engines"} & set(online)
        heard = manager.until("READY=1", WAIT_S)
        extended = [lines for lines in heard if lines[0].startswith("EXTEND_TIMEOUT_USEC=")]
        assert len(extended) >= 4
        assert any(f"provider={TENSORRT}" in line and "engines=0" in line for lines in heard for line in lines)
        asker = connect(mosquitto.port)
        assert list(asker.events(asker.send("hello"), timeout_s=WAIT_S))[-1]["type"] == "final"
        # The next start finds the engine.
        assert daemon.stop() == 0
        hold.touch()
        daemon.start()
        assert "preparing" not in {status["state"] for status in until(statuses, "online")}
    finally:
        daemon.kill()


def test_a_stop_does_not_wait_for_the_build(mosquitto, statuses, tmp_path, monkeypatch):
    hold = tmp_path / "hold"
    hold.touch()
    monkeypatch.setenv("HOLD_BUILD", str(hold))
    daemon = BuildingDaemon(mosquitto.port, tmp_path).start()
    try:
        until(statuses, "preparing")
        assert daemon.stop() == 0
        assert until(statuses, "offline")
        assert [path.name for path in (tmp_path / "cache/tensorrt").iterdir()] == ["lock"]
    finally:
        daemon.kill()
