"""The other end of the wire: a client that asks.

    with Asker(MqttConfig(host="127.0.0.1"), user="kitchen") as asker:
        asker.wait_online(10)
        final = asker.ask("What is MQTT?", on_delta=lambda text: print(text, end="", flush=True))

In MQTT 5 the id travels as CorrelationData and the reply topic as ResponseTopic; in 3.1.1 both are JSON fields.
"""

from __future__ import annotations

import logging
import queue
import secrets
import threading
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import msgspec

from edge_llm.errors import WIRE_ERROR_NAMES, ConfigError, EdgeLlmError, RequestError
from edge_llm.metrics import Metrics
from edge_llm.mqtt.client import MqttLink
from edge_llm.mqtt.connection import Outgoing, Session
from edge_llm.mqtt.topics import ROOT, Topics, is_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from edge_llm.config import MqttConfig
    from edge_llm.mqtt.messages import Incoming

log = logging.getLogger(__name__)

_TERMINAL_TYPES: Final = ("final", "error")
_JSON: Final = "application/json"

WireEvent = dict[str, Any]


class AskError(EdgeLlmError):
    """A question could not be asked, or has not been answered."""


class BrokerUnreachableError(AskError, ConnectionError):
    """No connection to the broker; the message says why."""


class DaemonOfflineError(AskError):
    """The broker is there, but no daemon that is ready."""


class AnswerTimeoutError(AskError, TimeoutError):
    """Nothing came for too long."""


@dataclass
class _Pending:
    """A query that has no terminal event yet. ``delivered``: the broker has it; ``answering``: the daemon has it."""

    message: Outgoing
    events: queue.SimpleQueue[WireEvent] = field(default_factory=queue.SimpleQueue)
    delivered: bool = False
    answering: bool = False


class Asker:
    """Asks one node, or a pool, and hands out the events that come back. Thread-safe.

    A query is sent again after a lost connection; the daemon answers it once all the same, because its id and body
    are the same.

    Args:
        config: the broker, and the ``node`` to ask.
        user: the name to ask as; the broker's ACL may bind it to ``config.username``.
        pool: ask this pool instead of the node.

    Raises:
        ConfigError: a name is not valid, or the password or TLS files cannot be used.
    """

    def __init__(self, config: MqttConfig, *, user: str = "cli", pool: str | None = None) -> None:
        if not is_name(user):
            raise ConfigError(f"user {user!r} is not a name of 1 to 64 letters, digits, '_' and '-'")
        self._config = config
        self._user = user
        topics = Topics(config.node, pool)
        self._scope = topics.pooled or topics.own
        client_id = f"edge_llm-ask-{secrets.token_hex(6)}"
        self._reply_topic = self._scope.reply(user, client_id)
        self._status_filter = topics.status if pool is None else f"{ROOT}/+/status"
        self._condition = threading.Condition()
        self._statuses: dict[str, WireEvent] = {}
        self._pending: dict[str, _Pending] = {}
        session = Session(
            client_id=client_id,
            # Errors about a message whose reply topic could not be read go to the default place.
            subscriptions=((self._reply_topic, 1), (self._scope.reply(user), 1), (self._status_filter, 1)),
            retained=True,
        )
        self._link = MqttLink(config, session, self._on_message, self._on_connected, Metrics())

    def __enter__(self) -> Asker:
        return self.connect()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def protocol(self) -> str:
        """The MQTT version in use."""
        return self._link.protocol

    def connect(self, timeout_s: float = 5.0) -> Asker:
        """Connect to the broker. Raises ``BrokerUnreachableError``; then this asker is closed."""
        self._link.start()
        if not self._link.wait_connected(timeout_s):
            trouble = self._link.trouble or f"no answer from {self._config.host}:{self._config.port}"
            self._link.close(0.0)
            raise BrokerUnreachableError(f"{trouble}. Is the broker running, and are host and port right?")
        return self

    def close(self) -> None:
        """Disconnect. Queries that run go on without a listener."""
        self._link.close(1.0)

    def wait_online(self, timeout_s: float = 30.0) -> WireEvent:
        """Wait until the node's retained status is ``online``; returns the status.

        Raises:
            DaemonOfflineError: it is not within ``timeout_s``; the message names the state it is in.
        """
        deadline = time.monotonic() + timeout_s
        with self._condition:
            while True:
                for status in self._statuses.values():
                    if status.get("state") == "online":
                        return status
                if not self._condition.wait(deadline - time.monotonic()):
                    raise DaemonOfflineError(self._describe_statuses(timeout_s))

    def ask(
        self,
        text: str | None = None,
        *,
        on_delta: Callable[[str], None] | None = None,
        timeout_s: float = 120.0,
        **fields: Any,
    ) -> WireEvent:
        """Ask, wait for the answer and return its ``final`` event.

        Args:
            text: the question; None if ``messages`` is among the fields.
            on_delta: called with each piece of text as it comes.
            timeout_s: the longest silence to bear.
            fields: any other field of a query (docs/contract.md).

        Raises:
            RequestError: the daemon answered with an error event.
            AnswerTimeoutError: nothing came for ``timeout_s``; the query has been cancelled.
        """
        for event in self.stream(text, timeout_s=timeout_s, **fields):
            if event["type"] == "delta" and on_delta is not None:
                on_delta(event["text"])
            elif event["type"] == "final":
                return event
            elif event["type"] == "error":
                raise _as_error(event)
        raise AssertionError("a stream ends with a terminal event")

    def stream(self, text: str | None = None, *, timeout_s: float = 120.0, **fields: Any) -> Iterator[WireEvent]:
        """Ask, and yield every event as it comes; the last is the ``final`` or the ``error``.

        Leaving the iterator early cancels the query. Raises ``AnswerTimeoutError`` as ``ask`` does.
        """
        query_id = self.send(text, **fields)
        finished = False
        try:
            for event in self.events(query_id, timeout_s=timeout_s):
                finished = event["type"] in _TERMINAL_TYPES
                yield event
        finally:
            if not finished:
                self.cancel(query_id)

    def send(self, text: str | None = None, **fields: Any) -> str:
        """Ask without waiting; returns the id under which ``events`` finds the answer and ``cancel`` ends it."""
        query_id = str(fields.pop("id", None) or secrets.token_hex(8))
        body = {name: value for name, value in fields.items() if value is not None}
        if text is not None:
            body["text"] = text
        if self._link.protocol == "5":
            payload = msgspec.json.encode(body)
            message = Outgoing(
                self._scope.query(self._user),
                payload,
                qos=1,
                content_type=_JSON,
                correlation=query_id.encode("utf-8"),
                response_topic=self._reply_topic,
            )
        else:
            payload = msgspec.json.encode({"id": query_id, "reply_to": self._reply_topic, **body})
            message = Outgoing(self._scope.query(self._user), payload, qos=1)
        pending = _Pending(message)
        with self._condition:
            self._pending[query_id] = pending
        self._link.publish(replace(message, on_done=lambda delivered: setattr(pending, "delivered", delivered)))
        return query_id

    def partial(self, utterance: str, seq: int, text: str, session: str | None = None) -> None:
        """Say what has been heard so far of a question that ``send(…, utterance=utterance)`` will ask."""
        fields = {"utterance": utterance, "seq": seq, "text": text, "session": session}
        payload = msgspec.json.encode({name: value for name, value in fields.items() if value is not None})
        self._link.publish(Outgoing(self._scope.partial(self._user), payload, qos=0, content_type=_JSON))

    def events(self, query_id: str, *, timeout_s: float = 120.0) -> Iterator[WireEvent]:
        """Yield the events of a query that was sent, up to its terminal one."""
        with self._condition:
            pending = self._pending.get(query_id)
        if pending is None:
            raise AskError(f"no query {query_id!r} is waiting for an answer here")
        try:
            while True:
                try:
                    event = pending.events.get(timeout=timeout_s)
                except queue.Empty:
                    trouble = f" ({self._link.trouble})" if self._link.trouble else ""
                    raise AnswerTimeoutError(f"no answer for {timeout_s:g} s{trouble}") from None
                yield event
                if event["type"] in _TERMINAL_TYPES:
                    return
        finally:
            with self._condition:
                self._pending.pop(query_id, None)

    def cancel(self, query_id: str) -> None:
        """End a query of ours. Its ``final`` says ``cancelled`` and carries the text so far."""
        with self._condition:
            pending = self._pending.get(query_id)
        # QoS 0 overtakes what the broker still holds back, even our query; so only if the daemon has the query.
        qos = 0 if pending is not None and pending.answering else 1
        payload = msgspec.json.encode({"id": query_id})
        self._link.publish(Outgoing(self._scope.cancel(self._user), payload, qos=qos, content_type=_JSON))

    def rate(self, query_id: str, rating: int, correction: str | None = None) -> None:
        """Say what a finished answer was worth: -1, 0 or 1."""
        fields = {"id": query_id, "rating": rating, "correction": correction}
        payload = msgspec.json.encode(fields)
        self._link.publish(Outgoing(self._scope.feedback(self._user), payload, qos=1, content_type=_JSON))

    def publish_state(self, name: str, value: float | str) -> None:
        """Publish a value for answers to use, retained, as the host of the node does."""
        topic = Topics(self._config.node).state_value(name)
        self._link.publish(Outgoing(topic, msgspec.json.encode(value), qos=1, retain=True, content_type=_JSON))

    # -- on the link's thread -----------------------------------------------------------------------------------------

    def _on_connected(self) -> None:
        with self._condition:
            unanswered = [pending.message for pending in self._pending.values() if pending.delivered]
        # Events that came while we were away are lost, so ask again. What has not reached the broker the link repeats.
        for message in unanswered:
            self._link.publish(message)

    def _on_message(self, incoming: Incoming) -> None:
        self._link.acknowledge(incoming.delivery)
        try:
            event = msgspec.json.decode(incoming.payload, type=dict[str, Any])
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            log.warning("a message on %s is not a JSON object", incoming.topic)
            return
        if incoming.topic.endswith("/status"):
            with self._condition:
                self._statuses[incoming.topic] = event
                self._condition.notify_all()
            return
        with self._condition:
            pending = self._pending.get(str(event.get("id")))
        # An event of another client of this user, or a second terminal event: nobody waits for it.
        if pending is not None and event.get("type") in ("delta", *_TERMINAL_TYPES):
            pending.answering = True
            pending.events.put(event)

    def _describe_statuses(self, waited_s: float) -> str:
        states = {status.get("state") for status in self._statuses.values()}
        if not states:
            return f"no daemon for {self._scope.base} has been seen on this broker: start `edge-llm serve`"
        return f"the daemon is {' and '.join(sorted(map(str, states)))}, not online, after {waited_s:g} s"


def _as_error(event: WireEvent) -> EdgeLlmError:
    code, message = event.get("code"), str(event.get("message"))
    if code in WIRE_ERROR_NAMES:
        return RequestError(code, message, retry_after_ms=event.get("retry_after_ms"))
    return AskError(f"{code} {event.get('name')}: {message}")
