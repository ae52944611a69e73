"""A scheduler that does what the query's text says, a link without a socket, a bare client, and a wire to cut."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edge_llm.bundle.manifest import GenerationDefaults
from edge_llm.config import Config, MqttConfig, ServingConfig
from edge_llm.errors import RequestError
from edge_llm.metrics import Metrics
from edge_llm.mqtt.acks import Delivery
from edge_llm.mqtt.connection import Outgoing
from edge_llm.mqtt.gateway import Gateway
from edge_llm.mqtt.messages import Incoming
from edge_llm.serving.request import Delta, Failed, Final, Request, Timing, Usage

WAIT_S = 10.0
TIMING = Timing(queue_ms=0.5, prefill_ms=1.0, ttft_ms=2.0, total_ms=3.0)


def final(text: str, reason: Any = "stop") -> Final:
    return Final(text, reason, Usage(prompt_tokens=3, completion_tokens=len(text.split())), TIMING)


class FakeScheduler:
    """``say a b c`` answers ``a b c`` in three deltas, ``fail 413`` fails, ``wait`` runs until ``finish`` or a cancel.

    ``submitted`` and ``cancelled`` receive what was called; events come from a thread of its own, as from the engine.
    """

    def __init__(self) -> None:
        self.submitted: queue.Queue[Request] = queue.Queue()
        self.cancelled: queue.Queue[tuple[str, str]] = queue.Queue()
        self.count = 0
        self.partials: list[tuple[str, str, int, str, str | None]] = []
        self._running: dict[tuple[str, str], Request] = {}
        self._lock = threading.Lock()
        self._work: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._engine, daemon=True)
        self._thread.start()

    def partial(self, user: str, utterance: str, seq: int, text: str, session: str | None) -> bool:
        stale = any(known[:2] == (user, utterance) and known[2] > seq for known in self.partials)
        self.partials.append((user, utterance, seq, text, session))
        return not stale

    def submit(self, request: Request) -> None:
        self.count += 1
        verb, _, rest = request.messages[-1].content.partition(" ")
        if verb == "wait":
            with self._lock:
                self._running[request.key] = request
            if rest:
                self._work.put(lambda: request.on_event(Delta(rest)))
        elif verb == "fail":
            request.on_event(Failed(RequestError(int(rest), f"told to fail with {rest}")))
        else:
            self._work.put(lambda: self._say(request, rest))
        self.submitted.put(request)

    def cancel(self, user: str, id: str) -> bool:
        with self._lock:
            request = self._running.pop((user, id), None)
        self.cancelled.put((user, id))
        if request is not None:
            self._work.put(lambda: request.on_event(final("so far", "cancelled")))
        return request is not None

    def finish(self, user: str, id: str, text: str = "done") -> None:
        with self._lock:
            request = self._running.pop((user, id))
        self._work.put(lambda: request.on_event(final(text)))

    def next(self, user: str | None = None) -> Request:
        """Wait for the next request (of that user)."""
        while True:
            request = self.submitted.get(timeout=WAIT_S)
            if user in (None, request.user):
                return request

    def close(self) -> None:
        self._work.put(None)
        self._thread.join(WAIT_S)

    def _say(self, request: Request, text: str) -> None:
        for piece in text.split(" "):
            request.on_event(Delta(piece + " "))
        request.on_event(final(text))

    def _engine(self) -> None:
        while (work := self._work.get()) is not None:
            work()


class FakeLink:
    """Takes what is published, and confirms QoS 1 when told to (at once by default)."""

    def __init__(self, *, confirm: bool = True) -> None:
        self.connected = True
        self.backlog = 0
        self.refuse_deltas = False
        self.confirm = confirm
        self.published: list[Outgoing] = []
        self.acknowledged: list[Delivery] = []
        self.unconfirmed: list[Outgoing] = []

    def publish(self, message: Outgoing) -> bool:
        if message.qos == 0 and self.refuse_deltas:
            return False
        self.published.append(message)
        if message.on_done is not None:
            self.unconfirmed.append(message)
            if self.confirm:
                self.confirm_all()
        return True

    def confirm_all(self) -> None:
        messages, self.unconfirmed = self.unconfirmed, []
        for message in messages:
            assert message.on_done is not None
            message.on_done(True)

    def acknowledge(self, delivery: Delivery | None) -> None:
        if delivery is not None:
            self.acknowledged.append(delivery)

    def events(self) -> list[dict[str, Any]]:
        return [msgspec.json.decode(message.payload) for message in self.published]


class RunningGateway:
    """A gateway with a fake scheduler on a real broker, online."""

    def __init__(
        self, port: int, *, online: bool = True, scheduler: FakeScheduler | None = None, **settings: Any
    ) -> None:
        serving = settings.pop("serving", {})
        settings.setdefault("reconnect_min_s", 0.02)
        settings.setdefault("reconnect_max_s", 0.2)
        self.config = Config(
            mqtt=MqttConfig(port=port, **settings),
            serving=ServingConfig(**{"delta_interval_ms": 0.0, **serving}),
        )
        self.metrics = Metrics()
        self.scheduler = scheduler or FakeScheduler()
        self.gateway = Gateway(self.config, self.metrics)
        self.gateway.bind(self.scheduler, GenerationDefaults())
        self.gateway.start()
        assert self.gateway.wait_connected(WAIT_S), self.gateway.link.trouble
        if online:
            self.gateway.set_state("online")

    def __enter__(self) -> RunningGateway:
        return self

    def __exit__(self, *_: object) -> None:
        self.gateway.close(2.0)
        self.scheduler.close()


class Wire:
    """A bare paho client that sees everything under edge_llm/v1 (or ``topics``) and publishes what it is told."""

    def __init__(self, port: int, protocol: str = "5", topics: tuple[str, ...] = ("edge_llm/v1/#",)) -> None:
        self.protocol = protocol
        self.messages: queue.Queue[Incoming] = queue.Queue()
        self._seen: list[Incoming] = []
        self._subscribed = threading.Event()
        version = MQTTProtocolVersion.MQTTv5 if protocol == "5" else MQTTProtocolVersion.MQTTv311
        self.client = Client(CallbackAPIVersion.VERSION2, protocol=version)
        self.client.on_connect = lambda client, *_: client.subscribe([(topic, 1) for topic in topics])
        self.client.on_subscribe = lambda *_: self._subscribed.set()
        self.client.on_message = lambda _client, _userdata, message: self.messages.put(
            Incoming(
                topic=message.topic,
                payload=message.payload,
                received_at=time.monotonic(),
                qos=message.qos,
                retain=message.retain,
                content_type=getattr(message.properties, "ContentType", None),
                correlation=getattr(message.properties, "CorrelationData", None),
            )
        )
        self.client.reconnect_delay_set(0.05, 0.2)
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()
        assert self._subscribed.wait(WAIT_S)

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.disconnect()
        self.client.loop_stop()

    def send(self, topic: str, body: Any, *, qos: int = 1, retain: bool = False, **properties: Any) -> None:
        payload = (
            body if isinstance(body, bytes) else body.encode() if isinstance(body, str) else msgspec.json.encode(body)
        )
        mqtt_properties = None
        if self.protocol == "5":
            mqtt_properties = Properties(PacketTypes.PUBLISH)
            for name, value in properties.items():
                setattr(mqtt_properties, name, value)
        self.client.publish(f"edge_llm/v1/{topic}", payload, qos, retain, mqtt_properties)

    def ask(self, body: Any, *, node: str = "edge", user: str = "ann", **rest: Any) -> None:
        self.send(f"{node}/query/{user}", body, **rest)

    def find(self, wanted: Callable[[Incoming], bool]) -> Incoming:
        """The next message that fits, or an earlier one that was passed over."""
        for message in self._seen:
            if wanted(message):
                self._seen.remove(message)
                return message
        deadline = time.monotonic() + WAIT_S
        while True:
            try:
                message = self.messages.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"it did not come; these did: {self._seen}") from None
            if wanted(message):
                return message
            self._seen.append(message)

    def terminal(self, query_id: str | None = None) -> dict[str, Any]:
        """The next ``final`` or ``error`` event (of that id)."""
        message = self.find(lambda message: _is_terminal(message, query_id))
        return {**msgspec.json.decode(message.payload), "topic": message.topic.removeprefix("edge_llm/v1/")}

    def events(self, query_id: str) -> list[dict[str, Any]]:
        """Every event of a query up to its terminal one, which must not have been taken yet."""
        self._seen.append(self.find(lambda message: _is_terminal(message, query_id)))
        found = [decoded for message in self._seen if (decoded := _event(message)).get("id") == query_id]
        self._seen = [message for message in self._seen if _event(message).get("id") != query_id]
        return found

    def status(self, state: str, node: str = "edge") -> dict[str, Any]:
        topic = f"edge_llm/v1/{node}/status"
        message = self.find(lambda m: m.topic == topic and msgspec.json.decode(m.payload)["state"] == state)
        return dict(msgspec.json.decode(message.payload))

    def nothing_more_than(self, barrier_user: str = "barrier") -> list[dict[str, Any]]:
        """Ask one more query and return every event that came before its answer: what did not come by then never
        will, because the link publishes in order."""
        self.ask({"id": "barrier", "text": "say end"}, user=barrier_user)
        self.events("barrier")
        return [event for message in self._seen if (event := _event(message)).get("type")]


def _event(message: Incoming) -> dict[str, Any]:
    if "/reply/" not in message.topic:
        return {}
    return dict(msgspec.json.decode(message.payload))


def _is_terminal(message: Incoming, query_id: str | None) -> bool:
    event = _event(message)
    return event.get("type") in ("final", "error") and query_id in (None, event["id"])


class Relay:
    """A TCP relay to a broker whose connections can be cut, and kept cut."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._accepting = True
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, *, for_good: bool = False) -> None:
        self._accepting = not for_good
        pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def allow(self) -> None:
        self._accepting = True

    def close(self) -> None:
        self.cut(for_good=True)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if not self._accepting:
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self._target_port))
            for sock in (client, server):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._pairs.append((client, server))
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
