"""The way back: one ``Reply`` turns the scheduler's events of one query into wire events for those who asked."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from edge_llm.errors import RequestError
from edge_llm.mqtt.connection import Outgoing
from edge_llm.mqtt.events import CONTENT_TYPE, encode_delta, encode_error, encode_final
from edge_llm.mqtt.messages import claimed_reply_to
from edge_llm.serving.request import Delta, Event, Failed
from edge_llm.serving.request import Final as FinalAnswer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from edge_llm.mqtt.acks import Delivery
    from edge_llm.mqtt.messages import Incoming
    from edge_llm.mqtt.topics import Route

log = logging.getLogger(__name__)

# Copies of one running query that ask for their answers at different places.
_MAX_ADDRESSES: Final = 16


class Outbox(Protocol):
    """What a reply needs of the link."""

    def publish(self, message: Outgoing) -> bool:
        """Queue a message; False if it was refused."""

    def acknowledge(self, delivery: Delivery | None) -> None:
        """A query has been dealt with."""


@dataclass(frozen=True)
class Address:
    """Where an event goes, and the CorrelationData that it carries."""

    topic: str
    correlation: bytes | None = None


def address_of(incoming: Incoming, route: Route, fields: Mapping[str, Any]) -> tuple[Address, RequestError | None]:
    """Where a message is answered. A place that is not the user's own is an error, sent to the default place."""
    place = claimed_reply_to(fields, incoming.response_topic)
    default = Address(route.scope.reply(route.user), incoming.correlation)
    if place is None:
        return default, None
    if not route.scope.allows_reply(route.user, place):
        allowed = route.scope.reply(route.user, "…")
        return default, RequestError(403, f"replies go to {allowed} only; name such a topic or none")
    return Address(place, incoming.correlation), None


@dataclass(frozen=True)
class ReplySettings:
    """How a query wants its answer."""

    node: str
    stream: bool
    delta_interval_ms: float


class Reply:
    """The events of one query.

    ``on_event`` is called by the scheduler, one call at a time; ``attach`` by the link's thread at any time. Text that
    cannot leave now (too soon after the last delta, or the link refuses it) stays and leaves with the next delta, so
    that the deltas always join to a beginning of the answer and ``seq`` has no gaps.

    Args:
        query_id: the query's id.
        settings: how it wants its answer.
        outbox: the link.
        on_delta: called after each delta with True if it was sent, False if the link refused it.
        on_terminal: called with the ``Final`` or ``Failed`` just before it is published.
    """

    def __init__(
        self,
        query_id: str,
        settings: ReplySettings,
        outbox: Outbox,
        *,
        on_delta: Callable[[bool], None],
        on_terminal: Callable[[FinalAnswer | Failed], None],
    ) -> None:
        self._id = query_id
        self._settings = settings
        self._outbox = outbox
        self._on_delta = on_delta
        self._on_terminal = on_terminal
        self._lock = threading.Lock()
        # Who waits for the terminal event at each address: their queries are acknowledged once the broker has it.
        self._waiting: dict[Address, list[Delivery]] = {}
        self._terminal: bytes | None = None
        self._first_address: Address | None = None
        self._seq = 0
        self._held_text = ""
        self._last_delta_at = -float("inf")

    @property
    def terminal_bytes(self) -> int:
        """Size of the terminal event, 0 before there is one."""
        return len(self._terminal or b"")

    def attach(self, address: Address, delivery: Delivery | None) -> None:
        """Add the query, or a repeated copy of it: its terminal event goes to ``address`` too, even if it has gone
        out before. Deltas go to the first address only.

        Raises:
            RequestError: 429, too many addresses wait for this answer.
        """
        with self._lock:
            waiting = self._waiting.get(address)
            if waiting is not None:
                # The one event that is still to be confirmed answers both copies.
                if delivery is not None:
                    waiting.append(delivery)
                return
            if len(self._waiting) >= _MAX_ADDRESSES:
                raise RequestError(429, "too many copies of this query ask for answers at different places")
            self._waiting[address] = [] if delivery is None else [delivery]
            self._first_address = self._first_address or address
            terminal = self._terminal
        if terminal is not None:
            self._publish_terminal(address, terminal)

    def on_event(self, event: Event) -> None:
        """Take the scheduler's next event."""
        if isinstance(event, Delta):
            self._take_text(event.text)
        else:
            self._finish(event)

    def _take_text(self, text: str) -> None:
        address = self._first_address
        if not self._settings.stream or not text or address is None:
            return
        self._held_text += text
        now = time.monotonic()
        if (now - self._last_delta_at) * 1000 < self._settings.delta_interval_ms:
            return
        payload = encode_delta(self._id, self._settings.node, self._seq, self._held_text)
        sent = self._outbox.publish(
            Outgoing(address.topic, payload, content_type=CONTENT_TYPE, correlation=address.correlation)
        )
        if sent:
            self._seq += 1
            self._held_text = ""
        # A refused delta is not tried again with every token: the link needs the time to recover.
        self._last_delta_at = now
        self._on_delta(sent)

    def _finish(self, event: FinalAnswer | Failed) -> None:
        node = self._settings.node
        if isinstance(event, Failed):
            payload = encode_error(self._id, node, self._seq, event.error)
        else:
            payload = encode_final(self._id, node, self._seq, event)
        with self._lock:
            if self._terminal is not None:
                log.error("query %s got a second terminal event; it is dropped", self._id)
                return
            self._terminal = payload
            addresses = list(self._waiting)
        self._on_terminal(event)
        for address in addresses:
            self._publish_terminal(address, payload)

    def _fallback(self, size_bytes: int) -> bytes:
        error = RequestError(500, f"the broker did not take the answer of {size_bytes} bytes: lower max_tokens")
        return encode_error(self._id, self._settings.node, self._seq, error)

    def _publish_terminal(self, address: Address, payload: bytes, *, is_fallback: bool = False) -> None:
        def confirmed(delivered: bool) -> None:
            if not delivered and not is_fallback:
                # The broker takes no message like this one: too large for it, mostly. A short one says so instead.
                self._publish_terminal(address, self._fallback(len(payload)), is_fallback=True)
                return
            # A query whose answer the broker will never take is acknowledged too: again would be no better.
            with self._lock:
                deliveries = self._waiting.pop(address, [])
            for delivery in deliveries:
                self._outbox.acknowledge(delivery)

        self._outbox.publish(
            Outgoing(
                address.topic,
                payload,
                qos=1,
                content_type=CONTENT_TYPE,
                correlation=address.correlation,
                on_done=confirmed,
            )
        )
