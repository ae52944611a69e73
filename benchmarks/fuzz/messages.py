"""Subjects: what comes from the broker. Every message goes through a whole gateway, without a socket."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any, Final

import msgspec

from benchmarks.fuzz.mutation import damaged, odd_text, restated_tree
from benchmarks.fuzz.subject import require
from edge_llm.bundle.manifest import GenerationDefaults
from edge_llm.config import Config, MqttConfig
from edge_llm.metrics import Metrics
from edge_llm.mqtt.acks import Delivery
from edge_llm.mqtt.gateway import Gateway
from edge_llm.mqtt.messages import Incoming
from edge_llm.mqtt.topics import is_name
from edge_llm.serving.request import Delta, Timing, Usage
from edge_llm.serving.request import Final as FinalAnswer

if TYPE_CHECKING:
    from pathlib import Path
    from random import Random

    from edge_llm.mqtt.connection import Outgoing
    from edge_llm.serving.request import Request

_ROOT: Final = "edge_llm/v1"
_BASES: Final = (f"{_ROOT}/edge", f"{_ROOT}/pool/garage")
_KINDS: Final = ("query", "query", "query", "partial", "cancel", "feedback", "state")
_USERS: Final = ("ann", "bob")
_SAMPLES: Final[tuple[dict[str, Any], ...]] = (
    {"id": "q1", "text": "say hi"},
    {
        "id": "q2", "text": "Open the window", "session": "s", "utterance": "u", "supersedes": "q1", "stream": False,
        "max_tokens": 8, "temperature": 0.7, "top_k": 4, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1,
        "seed": 7, "stop": ["\n", "."], "deadline_ms": 5000, "priority": "background", "cache": "bypass",
        "reply_to": f"{_ROOT}/edge/reply/ann/here",
    },
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How far is the coast?"}]},
    {"utterance": "u", "seq": 3, "text": "open the win", "session": "s"},
    {"id": "q1", "rating": -1, "correction": "the other window"},
    {"id": "q1"},
)  # fmt: skip
_PLACES: Final = (f"{_ROOT}/edge/reply/ann/a", f"{_ROOT}/edge/reply/bob/a", f"{_ROOT}/pool/garage/reply/ann/a", "x/y")
_TYPES: Final = (
    None,
    None,
    "application/json",
    "text/plain; charset=utf-8",
    "text/plain;charset=x",
    "image/png",
    "\0;",
)
_TIMING: Final = Timing(queue_ms=0.0, prefill_ms=1.0, ttft_ms=1.0, total_ms=1.0)
# The dedupe table remembers every id; a new gateway now and then keeps one campaign's memory bounded.
_GATEWAY_MESSAGES: Final = 2000


class _Message(msgspec.Struct, frozen=True):
    """What ``Incoming`` is made of."""

    topic: bytes
    payload: bytes
    qos: int = 1
    retain: bool = False
    dup: bool = False
    content_type: str | None = None
    response_topic: str | None = None
    correlation: bytes | None = None
    expiry_s: int | None = None


class _Outbox:
    """A link that notes what is published, and confirms it at once."""

    connected = True
    backlog = 0

    def __init__(self) -> None:
        self.published: list[Outgoing] = []
        self.acknowledged = 0

    def publish(self, message: Outgoing) -> bool:
        self.published.append(message)
        if message.on_done is not None:
            message.on_done(True)
        return True

    def acknowledge(self, delivery: Delivery | None) -> None:
        self.acknowledged += delivery is not None


class _Scheduler:
    """Answers at once with what it was asked."""

    def submit(self, request: Request) -> None:
        request.on_event(Delta("he"))
        request.on_event(FinalAnswer("hey", "stop", Usage(), _TIMING))

    def cancel(self, _user: str, _request_id: str, /) -> bool:
        return False

    def partial(self, _user: str, _utterance: str, _seq: int, _text: str, _session: str | None) -> bool:
        return True


class _Wire:
    """The gateway, and what holds for every message whatever it is."""

    def __init__(self) -> None:
        self._count = 0

    def take(self, case: bytes) -> str:
        """Hand a message to the gateway; what it did with it."""
        message = msgspec.msgpack.decode(case, type=_Message)
        try:
            topic = message.topic.decode()
        except UnicodeDecodeError:
            return "topic is not UTF-8"  # where client.py stops it
        if self._count % _GATEWAY_MESSAGES == 0:
            self._open()
        self._count += 1
        self._outbox.published.clear()
        self._outbox.acknowledged = 0
        delivery = Delivery(1, self._count) if message.qos else None
        fields = {name: getattr(message, name) for name in message.__struct_fields__ if name != "topic"}
        self._gateway._on_message(Incoming(topic=topic, received_at=time.monotonic(), delivery=delivery, **fields))
        return self._check(topic, message)

    def _open(self) -> None:
        self._outbox = _Outbox()
        self._gateway = Gateway(Config(mqtt=MqttConfig(pool="garage")), Metrics())
        self._gateway.link = self._outbox  # type: ignore[assignment]
        self._gateway.bind(_Scheduler(), GenerationDefaults())
        self._gateway.set_state("online")

    def _check(self, topic: str, message: _Message) -> str:
        events = []
        user = topic.rpartition("/")[2]
        base = next((base for base in _BASES if topic.startswith(f"{base}/")), None)
        for outgoing in self._outbox.published:
            event = msgspec.json.decode(outgoing.payload)
            if outgoing.topic == f"{_BASES[1]}/cancel/{user}":
                continue  # a query of a pool that supersedes one of another device
            require(base is not None and is_name(user), f"{topic!r} was answered")
            require(outgoing.topic.startswith(f"{base}/reply/{user}/"), f"an answer went to {outgoing.topic!r}")
            require(not set(outgoing.topic) & set("#+\0"), f"an answer went to {outgoing.topic!r}")
            require(outgoing.correlation == message.correlation, "the correlation data are others")
            events.append(event)
        ends = [event for event in events if event["type"] != "delta"]
        # A copy of a query that was answered before gets the same terminal event again, and that alone.
        numbers = [event["seq"] for event in events]
        require(len(events) == 1 or numbers == list(range(len(events))), "seq has gaps")
        require(self._outbox.acknowledged == (1 if message.qos else 0), f"{self._outbox.acknowledged} acknowledgements")
        kind = topic[len(base) + 1 :].partition("/")[0] if base else ""
        is_query = kind == "query" and is_name(user) and not message.retain and topic == f"{base}/query/{user}"
        require(not is_query or len(ends) == 1, f"a query had {len(ends)} terminal events")
        if not ends:
            return "taken or ignored without a reply"
        require(ends[0].get("code") != 500, "the daemon failed on it")
        return f"{ends[0]['code']} {ends[0]['name']}" if ends[0]["type"] == "error" else "answered"


class Payloads(_Wire):
    """Damaged payloads and properties on good topics."""

    def make(self, rng: Random) -> bytes:
        """A message."""
        tree = restated_tree(rng.choice(_SAMPLES), rng) if rng.random() < 0.9 else rng.choice(_SAMPLES)
        if isinstance(tree, dict) and "id" in tree and rng.random() < 0.7:
            tree["id"] = f"q{rng.randrange(10**9)}"  # otherwise nearly all would repeat an id
        payload = _encoded(tree)
        how = rng.random()
        if how < 0.2:
            payload = damaged(payload, rng)
        elif how < 0.25:
            payload = odd_text(rng, "How far is it?").encode("utf-8", "surrogatepass")
        elif how < 0.27:
            payload = rng.choice((b"[", b'{"text":')) * rng.choice((500, 1500, 20_000))
        message = _Message(
            topic=f"{rng.choice(_BASES)}/{rng.choice(_KINDS)}/{rng.choice(_USERS)}".encode(),
            payload=payload,
            qos=rng.randrange(2),
            retain=rng.random() < 0.05,
            dup=rng.random() < 0.2,
            content_type=rng.choice(_TYPES),
            response_topic=rng.choice((None, None, *_PLACES)),
            correlation=rng.choice((None, b"", b"turn", rng.randbytes(rng.randrange(80)))),
            expiry_s=rng.choice((None, None, 0, 1, 2**32 - 1)),
        )
        return msgspec.msgpack.encode(message)


class TopicNames(_Wire):
    """Damaged topics and places to reply to, with good queries."""

    def make(self, rng: Random) -> bytes:
        """A message."""
        topic = f"{rng.choice(_BASES)}/{rng.choice((*_KINDS, 'reply', 'status'))}/{rng.choice(_USERS)}"
        place = rng.choice(_PLACES)
        query = {"id": f"q{rng.randrange(10**9)}", "text": "say hi"}
        if rng.random() < 0.6:
            topic = _odd_topic(rng, topic)
        if rng.random() < 0.6:
            place = _odd_topic(rng, place)
        in_payload = rng.random() < 0.5
        if in_payload:
            query["reply_to"] = place
        encoded = topic.encode("utf-8", "surrogatepass")
        message = _Message(
            topic=damaged(encoded, rng) if rng.random() < 0.2 else encoded,
            payload=_encoded(query),
            response_topic=None if in_payload else place.encode("utf-8", "replace").decode(),
        )
        return msgspec.msgpack.encode(message)


def payloads(_folder: Path) -> Payloads:
    """The subject."""
    return Payloads()


def topics(_folder: Path) -> TopicNames:
    """The subject."""
    return TopicNames()


def _odd_topic(rng: Random, topic: str) -> str:
    levels = topic.split("/")
    at = rng.randrange(len(levels))
    how = rng.randrange(5)
    if how == 0:
        levels[at] = odd_text(rng, levels[at])
    elif how == 1:
        levels.insert(at, rng.choice(("", "..", ".", "+", "#", "pool", *levels)))
    elif how == 2:
        del levels[at]
    elif how == 3:
        levels += rng.choice(("x", "")) * rng.choice((1, 40, 600))
    else:
        return odd_text(rng, topic)
    return "/".join(levels)


def _encoded(tree: object) -> bytes:

    return json.dumps(tree, ensure_ascii=False).encode("utf-8", "surrogatepass")
