"""A daemon under queries switches bundles: no query is lost, none is answered twice, and a bad bundle stays out."""

from __future__ import annotations

import json
import signal
import threading
from collections import Counter
from pathlib import Path

import paho.mqtt.client as mqtt
import pytest

from edge_llm.bundle.incoming import install
from edge_llm.bundle.store import BundleStore
from edge_llm.bundle_command import activate_bundle, roll_back
from edge_llm.config import Config, EngineConfig
from edge_llm.errors import BundleError
from tests.brokers import wait_for
from tests.bundle.versions import unhealthy, version_of
from tests.integration.conftest import Daemon

pytestmark = [pytest.mark.broker, pytest.mark.timeout(600)]
WAIT_S = 240


class Wire:
    """Hears all that the daemon publishes."""

    def __init__(self, port: int) -> None:
        self.terminals: Counter[str] = Counter()
        self.retained: dict[str, dict] = {}
        self.statuses: list[str] = []
        self.running: set[str] = set()
        subscribed = threading.Event()
        self._client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
        self._client.on_message = self._hear
        self._client.on_subscribe = lambda *_: subscribed.set()
        self._client.connect("127.0.0.1", port)
        self._client.subscribe("edge_llm/v1/#", qos=1)
        self._client.loop_start()
        assert subscribed.wait(WAIT_S)

    def _hear(self, _client, _data, message) -> None:
        *_, kind = message.topic.split("/")
        if kind in ("status", "info", "metrics"):
            self.retained[kind] = json.loads(message.payload)
            if kind == "status":
                self.statuses.append(self.retained[kind]["state"])
        elif "/reply/" in message.topic:
            event = json.loads(message.payload)
            if event["type"] == "delta":
                self.running.add(event["id"])
            else:
                self.terminals[event["id"], event["type"], event.get("code")] += 1

    def served(self) -> str:
        return self.retained.get("info", {}).get("bundle", {}).get("version", "")

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


@pytest.fixture
def wire(mosquitto):
    wire = Wire(mosquitto.port)
    yield wire
    wire.close()


@pytest.fixture
def config(tmp_path, mosquitto) -> Config:
    """What the commands are run with; the daemon has the same store and cache."""
    return Config(
        cache_dir=str(tmp_path / "cache"),
        bundle_store=str(tmp_path / "store"),
        engine=EngineConfig(threads=1, prepare=False),
        activation_timeout_s=WAIT_S,
    )


@pytest.fixture
def digests(config, tmp_path) -> dict[str, str]:
    """Two good bundles and a bad one; the first is current."""
    store = BundleStore(Path(config.bundle_store))
    sources = [version_of(tmp_path, "1.0"), version_of(tmp_path, "2.0"), unhealthy(tmp_path, "3.0")]
    found = {source.name.partition("-")[2]: install(store, source)[0].digest for source in sources}
    store.activated(found["1.0"])
    return found


@pytest.fixture
def start(mosquitto, tmp_path, config):
    started = []

    def start(module: str = "edge_llm.cli") -> Daemon:
        settings = (
            f"bundle_store={tmp_path / 'store'}",
            f"activation_timeout_s={WAIT_S}",
            "engine.slots=2",
            "engine.prepare=false",
        )
        daemon = Daemon(tmp_path, mosquitto.port, tmp_path, *settings, "serving.metrics_interval_s=0.2")
        at = daemon._command.index("--bundle")
        del daemon._command[at : at + 2]
        daemon._command[2] = module
        started.append(daemon.start())
        return daemon

    yield start
    for daemon in started:
        daemon.kill()


class Asking(threading.Thread):
    """Asks one question after the other until it is stopped, some of them two at a time."""

    def __init__(self, asker) -> None:
        super().__init__(daemon=True)
        self.asker = asker
        self.enough = threading.Event()
        self.asked: list[str] = []
        self.ended: Counter[str] = Counter()

    def run(self) -> None:
        while not self.enough.is_set():
            queries = [
                self.asker.send(f"question {len(self.asked) + more}", max_tokens=24, cache="bypass") for more in (0, 1)
            ]
            self.asked += queries
            for query in queries:
                *_, last = self.asker.events(query, timeout_s=WAIT_S)
                self.ended[last["type"], last.get("code")] += 1

    def stop(self) -> None:
        self.enough.set()
        self.join(WAIT_S)
        assert not self.is_alive()


def test_under_queries_it_switches_with_none_lost_or_doubled(mosquitto, start, connect, wire, config, digests):
    daemon = start()
    asking = Asking(connect(mosquitto.port, online=False))
    wait_for(lambda: wire.served() == "1.0", WAIT_S)
    asking.start()
    assert "has answered its health prompt" in list(activate_bundle(config, "tiny@2.0"))[-1]
    wait_for(lambda: wire.served() == "2.0", WAIT_S)
    assert wire.retained["info"]["update"] == {"digest": digests["2.0"], "ok": True}
    # A bad one is refused by name, and changes nothing.
    with pytest.raises(BundleError, match="does not generate the token recorded at export"):
        list(activate_bundle(config, "tiny@3.0"))
    wait_for(lambda: wire.retained["info"]["update"]["ok"] is False, WAIT_S)
    assert wire.retained["info"]["update"]["digest"] == digests["3.0"]
    assert "does not generate the token" in wire.retained["info"]["update"]["reason"]
    assert wire.served() == "2.0"
    assert list(roll_back(config))
    wait_for(lambda: wire.served() == "1.0", WAIT_S)
    before = len(asking.asked)
    wait_for(lambda: len(asking.asked) > before + 2, WAIT_S)
    asking.stop()
    # Every one has been answered, once, and none was refused: the status has never been anything but online.
    assert asking.ended == {("final", None): len(asking.asked)}
    wait_for(lambda: len(wire.terminals) == len(asking.asked), WAIT_S)
    assert set(wire.terminals.values()) == {1}
    online = wire.statuses[wire.statuses.index("online") :]
    assert set(online) == {"online"}
    wait_for(lambda: wire.retained["metrics"]["counters"].get("bundle_switches") == 2, WAIT_S)
    assert sum("bundle_refused" in name for name in wire.retained["metrics"]["counters"]) == 1
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.log()
    selection = BundleStore(Path(config.bundle_store)).selection()
    assert (selection.current, selection.previous) == (digests["1.0"], digests["2.0"])


def test_without_memory_for_two_accepted_queries_are_answered_first(mosquitto, start, connect, wire, config, digests):
    daemon = start("tests.integration.narrow_daemon")
    asker = connect(mosquitto.port, online=False)
    wait_for(lambda: wire.served() == "1.0", WAIT_S)
    accepted = [asker.send(f"question {number}", max_tokens=60, cache="bypass") for number in range(6)]
    wait_for(lambda: bool(wire.running & set(accepted)), WAIT_S)
    assert list(activate_bundle(config, "tiny@2.0"))
    wait_for(lambda: wire.served() == "2.0", WAIT_S)
    for query in accepted:
        *_, last = asker.events(query, timeout_s=WAIT_S)
        assert last["type"] == "final"
    assert "draining" in wire.statuses
    # A bad one costs a pause, and then the old one answers again.
    with pytest.raises(BundleError, match="does not generate the token"):
        list(activate_bundle(config, "tiny@3.0"))
    wait_for(lambda: wire.statuses[-1] == "online", WAIT_S)
    assert wire.served() == "2.0"
    assert asker.ask("still there?", cache="bypass")["type"] == "final"
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.log()


def test_a_damaged_current_bundle_gives_way_to_the_one_before_and_sighup_switches(
    mosquitto, start, connect, wire, config, digests
):
    store = BundleStore(Path(config.bundle_store))
    store.activated(digests["2.0"])
    (store.path(digests["2.0"]) / "tokenizer.json").write_bytes(b"{}")
    daemon = start()
    asker = connect(mosquitto.port, online=False)
    wait_for(lambda: wire.served() == "1.0", WAIT_S)
    assert wire.retained["info"]["update"]["digest"] == digests["2.0"]
    assert "tokenizer.json" in wire.retained["info"]["update"]["reason"]
    assert store.selection().current == digests["1.0"]
    # A new copy of it, made current by hand: SIGHUP looks at once.
    install(store, Path(config.bundle_store).parent / "tiny-2.0")
    store.activated(digests["2.0"])
    daemon.process.send_signal(signal.SIGHUP)
    wait_for(lambda: wire.served() == "2.0", WAIT_S)
    assert asker.ask("hello", cache="bypass")["type"] == "final"
    assert daemon.stop() == 0
