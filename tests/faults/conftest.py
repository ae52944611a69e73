"""Daemons whose faults a test switches on, and one client that sees everything and speaks for everybody."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from tests.brokers import wait_for
from tests.faults.proxy import Proxy
from tests.integration.conftest import Daemon
from tests.paths import TINY_BUNDLE

WAIT_S = 60.0
# What a loaded machine may take beyond a promise in seconds: the tests run beside other work.
SLACK_S = float(os.environ.get("EDGE_LLM_TEST_SLACK_S", "3"))
BASE = "edge_llm/v1/edge"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(300))


class FaultyDaemon(Daemon):
    """The daemon of faulty_daemon.py. Its log passes through a pipe, so that a limit on files does not touch it."""

    def __init__(self, bundle: Path, port: int, folder: Path, *settings: str) -> None:
        # A copy for the processor would be prepared once a test, which takes longer than most of them.
        settings = ("engine.prepare=false", "serving.metrics_interval_s=0.1", "serving.delta_interval_ms=0", *settings)
        super().__init__(bundle, port, folder, *settings)
        self._command[2] = "tests.faults.faulty_daemon"
        self.faults = folder / "faults"
        self.faults.mkdir(exist_ok=True)
        self.prefix: list[str] = []

    def start(self) -> FaultyDaemon:
        environ = {name: value for name, value in os.environ.items() if not name.startswith("EDGE_LLM_")}
        environ["FAULTS"] = str(self.faults)
        with self.log_path.open("ab") as log:
            copier = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=log)
        assert copier.stdin is not None
        self.process = subprocess.Popen(
            [*self.prefix, *self._command], stdout=copier.stdin, stderr=copier.stdin, env=environ
        )
        copier.stdin.close()
        return self

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def set(self, fault: str, value: object = "") -> None:
        # By a rename: the daemon must not read half a number.
        partial = self.faults / f".{fault}"
        partial.write_text(str(value))
        partial.replace(self.faults / fault)

    def wait_log(self, text: str, count: int = 1, timeout_s: float = WAIT_S) -> None:
        wait_for(lambda: self.log().count(text) >= count, timeout_s, self.log)

    def anonymous_bytes(self) -> int:
        """What it has of memory of its own (RssAnon of proc(5))."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024

    def warnings(self) -> list[str]:
        lines = [json.loads(line) for line in self.log().splitlines() if line.startswith("{")]
        return [line["message"] for line in lines if line["level"] in ("warning", "error")]


class Client5:
    """A bare MQTT 5 client that records all that it hears, with its time, and publishes for any user."""

    def __init__(self, port: int, *topics: str) -> None:
        self._topics = topics or ("edge_llm/v1/#",)
        self._changed = threading.Condition()
        self._heard: list[tuple[float, str, Any]] = []
        self.connections = 0
        self._count = 0
        self.client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
        self.client.max_inflight_messages_set(0)
        self.client.on_connect = lambda client, *_: client.subscribe([(topic, 1) for topic in self._topics])
        self.client.on_subscribe = self._note_connection
        self.client.on_message = self._note_message
        self.client.reconnect_delay_set(0.05, 0.2)
        self.client.connect("127.0.0.1", port, keepalive=600)
        self.client.loop_start()
        self.wait(lambda: self.connections > 0)

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()

    def wait(self, condition: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, timeout_s), f"in vain; heard: {self._heard[-5:]}"

    def send(self, topic: str, body: Any, *, qos: int = 1, **properties: Any) -> None:
        mqtt_properties = Properties(PacketTypes.PUBLISH)
        for name, value in properties.items():
            setattr(mqtt_properties, name, value)
        self.client.publish(f"{BASE}/{topic}", json.dumps(body), qos, properties=mqtt_properties)

    def ask(self, text: str, *, user: str = "ann", properties: dict[str, Any] | None = None, **fields: Any) -> str:
        """Send a query; returns its id. Nothing is answered from a cache unless ``cache`` says so."""
        self._count += 1
        fields.setdefault("id", f"{user}-{self._count}")
        body = {"cache": "bypass", "max_tokens": 4, "text": text, **fields}
        self.send(f"query/{user}", body, **(properties or {}))
        return str(fields["id"])

    def events(self, query_id: str) -> list[dict[str, Any]]:
        """What has come so far about a query."""
        with self._changed:
            heard = [event for _, topic, event in self._heard if "/reply/" in topic]
        return [event for event in heard if event["id"] == query_id]

    def terminals(self, query_id: str) -> list[dict[str, Any]]:
        return [event for event in self.events(query_id) if event["type"] != "delta"]

    def terminal(self, query_id: str, timeout_s: float = WAIT_S) -> dict[str, Any]:
        """Wait for a query's terminal event."""
        self.wait(lambda: bool(self.terminals(query_id)), timeout_s)
        return self.terminals(query_id)[0]

    def answer(self, text: str = "hello", **fields: Any) -> dict[str, Any]:
        """Ask and wait for the final."""
        timeout_s = fields.pop("timeout_s", WAIT_S)
        event = self.terminal(self.ask(text, **fields), timeout_s)
        assert event["type"] == "final", event
        return event

    def running(self, query_id: str) -> None:
        """Wait until text of a query has come."""
        self.wait(lambda: bool(self.events(query_id)))

    def statuses(self, since: float = 0.0) -> list[str]:
        with self._changed:
            heard = [(at, event) for at, topic, event in self._heard if topic == f"{BASE}/status"]
        return [event["state"] for at, event in heard if at >= since]

    def wait_status(self, state: str, since: float = 0.0, timeout_s: float = WAIT_S) -> None:
        """Wait for a status; ``since`` is a time of ``time.monotonic()``."""
        self.wait(lambda: state in self.statuses(since), timeout_s)

    def metrics(self) -> dict[str, Any]:
        """Wait for the next report of the daemon. Its counters stand under their own names."""
        now = time.monotonic()

        def newer() -> list[Any]:
            # Not the next one: it may have been made before.
            return [event for at, topic, event in self._heard if topic == f"{BASE}/metrics" and at > now][1:]

        self.wait(lambda: bool(newer()))
        report = newer()[-1]
        return {**report, **report["counters"]}

    def _note_connection(self, *_: object) -> None:
        with self._changed:
            self.connections += 1
            self._changed.notify_all()

    def _note_message(self, _client: Client, _data: object, message: Any) -> None:
        if "/reply/" in message.topic or message.topic.endswith(("/status", "/metrics")):
            with self._changed:
                self._heard.append((time.monotonic(), message.topic, json.loads(message.payload)))
                self._changed.notify_all()


@pytest.fixture
def start_faulty(tmp_path: Path) -> Iterator[Callable[..., FaultyDaemon]]:
    """Starts daemons; they are killed at the end of the test. ``slow`` is the first value of that fault."""
    started: list[FaultyDaemon] = []

    def start(
        port: int, *settings: str, bundle: Path = TINY_BUNDLE, slow: float = 0.0, prefix: tuple[str, ...] = ()
    ) -> FaultyDaemon:
        daemon = FaultyDaemon(bundle, port, tmp_path, *settings)
        daemon.set("slow", slow)
        daemon.prefix = list(prefix)
        started.append(daemon.start())
        return daemon

    yield start
    for daemon in started:
        daemon.kill()


@pytest.fixture
def listen() -> Iterator[Callable[..., Client5]]:
    """Makes clients, closed at the end of the test."""
    made: list[Client5] = []

    def listen(port: int, *topics: str) -> Client5:
        made.append(Client5(port, *topics))
        return made[-1]

    yield listen
    for client in made:
        client.close()


@pytest.fixture
def proxy(mosquitto) -> Iterator[Proxy]:
    with Proxy(mosquitto.port) as proxy:
        yield proxy
