"""A daemon in a process of its own, and a client that notes when each event came."""

from __future__ import annotations

import json
import queue
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from edge_llm.bundle.manifest import Bundle

NODE: Final = "bench"
USER: Final = "bench"
_BASE: Final = f"edge_llm/v1/{NODE}"
_STOP_TIMEOUT_S: Final = 30.0
_CONNECT_TIMEOUT_S: Final = 10.0


class ServingError(Exception):
    """The daemon or the broker did not do what the measurement needs; the message says what."""


@dataclass(frozen=True)
class Event:
    """A message and when it was read, in ``time.monotonic()`` seconds."""

    at: float
    topic: str
    payload: dict[str, Any]


@dataclass
class Answer:
    """One query: when it was published, its deltas and its terminal event."""

    published_at: float
    deltas: list[Event] = field(default_factory=list)
    final: Event | None = None


class Daemon:
    """``edge-llm serve`` as its users start it.

    Args:
        bundle: what it serves.
        cache_dir: where the bundle's prepared copy is.
        port: of the broker on 127.0.0.1.
        log_path: gets its standard error.
        settings: more of them, as ``cache.prefix=false``.
    """

    def __init__(
        self, bundle: Bundle, cache_dir: Path, port: int, log_path: Path, settings: Sequence[str] = ()
    ) -> None:
        self._command = [sys.executable, "-m", "edge_llm.cli", "serve", "--bundle", str(bundle.path)]
        self._command += ["--host", "127.0.0.1", "--port", str(port), "--node", NODE]
        self._command += ["--set", f"cache_dir={cache_dir}"]
        self._command += [f"--set={setting}" for setting in settings]
        self._log_path = log_path
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Process id while it runs."""
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        """It has been started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> float:
        """Start the process; returns the moment before, in ``time.monotonic()`` seconds."""
        started_at = time.monotonic()
        with self._log_path.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        return started_at

    def stop(self) -> None:
        """SIGTERM, and wait until it has ended."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def last_words(self) -> str:
        """The last line of its log."""
        lines = self._log_path.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it logged nothing"


class BenchClient:
    """An MQTT 5 client with TCP_NODELAY, like one that a user would write with paho.

    Attributes:
        info: what the daemon last said about itself before it was online.
    """

    def __init__(self, port: int) -> None:
        self.info: dict[str, Any] = {}
        self._events: queue.Queue[Event] = queue.Queue()
        self._subscribed: queue.Queue[None] = queue.Queue()
        self._client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
        self._client.on_message = self._on_message
        self._client.on_socket_open = set_nodelay
        self._client.on_connect = lambda client, *_: client.subscribe(
            [(f"{_BASE}/status", 1), (f"{_BASE}/info", 1), (f"{_BASE}/reply/{USER}/default", 1)]
        )
        self._client.on_subscribe = lambda *_: self._subscribed.put(None)
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        try:
            self._subscribed.get(timeout=_CONNECT_TIMEOUT_S)
        except queue.Empty:
            raise ServingError("the broker did not accept the client") from None

    def close(self) -> None:
        """Disconnect."""
        self._client.disconnect()
        self._client.loop_stop()

    def wait_online(self, daemon: Daemon, since: float, timeout_s: float = 60.0) -> float:
        """Wait for the status ``online`` of a daemon started at ``since``; returns when it came.

        Raises:
            ServingError: it ended, or is not online in time.
        """
        deadline = since + timeout_s
        while True:
            event = self._next(deadline, daemon, "is not online")
            if event.topic.endswith("/info"):
                self.info = event.payload
            elif event.at >= since and event.topic.endswith("/status") and event.payload.get("state") == "online":
                return event.at

    def ask(
        self, daemon: Daemon, queries: list[dict[str, Any]], timeout_s: float = 120.0, user: str = USER
    ) -> list[Answer]:
        """Publish queries at once, wait for all their terminal events.

        Raises:
            ServingError: a query was refused, the daemon ended, or it took too long.
        """
        answers: dict[str, Answer] = {}
        for query in queries:
            payload = json.dumps(query)
            answers[query["id"]] = Answer(time.monotonic())
            self._client.publish(f"{_BASE}/query/{user}", payload, qos=1)
        deadline = time.monotonic() + timeout_s
        while any(answer.final is None for answer in answers.values()):
            event = self._next(deadline, daemon, "has not answered")
            answer = answers.get(event.payload.get("id", ""))
            if answer is None:
                continue
            if event.payload["type"] == "error":
                raise ServingError(f"a query was refused: {event.payload['message']}")
            if event.payload["type"] == "delta":
                answer.deltas.append(event)
            else:
                answer.final = event
        return list(answers.values())

    def _next(self, deadline: float, daemon: Daemon, otherwise: str) -> Event:
        while True:
            try:
                return self._events.get(timeout=min(1.0, max(0.01, deadline - time.monotonic())))
            except queue.Empty:
                if not daemon.running or time.monotonic() > deadline:
                    raise ServingError(f"the daemon {otherwise}: {daemon.last_words()}") from None

    def _on_message(self, _client: Client, _userdata: object, message: MQTTMessage) -> None:
        at = time.monotonic()
        self._events.put(Event(at, message.topic, json.loads(message.payload)))


def set_nodelay(_client: Client, _userdata: object, connection: Any) -> None:
    """For paho's ``on_socket_open``: small packets leave at once."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
