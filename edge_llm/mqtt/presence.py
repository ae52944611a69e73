"""What a node says of itself: its status and info, retained, and its metrics now and then."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import msgspec

from edge_llm.mqtt.connection import Outgoing
from edge_llm.mqtt.events import CONTENT_TYPE, encode_status

if TYPE_CHECKING:
    from edge_llm.device.power import PowerLevel
    from edge_llm.metrics import Metrics
    from edge_llm.mqtt.client import MqttLink
    from edge_llm.mqtt.topics import Topics

log = logging.getLogger(__name__)

State: TypeAlias = Literal["preparing", "loading", "online", "draining", "offline"]


def last_will(node: str, topics: Topics) -> Outgoing:
    """What the broker says of the node when its connection is lost."""
    return Outgoing(topics.status, encode_status(node, "offline", {}), qos=1, retain=True, content_type=CONTENT_TYPE)


class Presence:
    """Publishes over one link, and again on each connection. Thread-safe.

    Args:
        node: the name of this device.
        topics: its topics.
        link: where to.
        metrics: what is reported.
    """

    def __init__(self, node: str, topics: Topics, link: MqttLink, metrics: Metrics) -> None:
        self._node = node
        self._topics = topics
        self._link = link
        self._metrics = metrics
        # Guards what is retained, and the order in which it is published.
        self._lock = threading.Lock()
        self._state: State = "loading"
        self._detail: dict[str, Any] = {}
        self._power: PowerLevel = "normal"
        self._status = encode_status(node, "loading", {})
        self._info: bytes | None = None
        self._pending: dict[str, bytes] = {}
        self._stopped = threading.Event()

    def start(self, metrics_interval_s: float) -> None:
        """Publish the metrics that often, until ``close``."""
        threading.Thread(target=self._report_metrics, args=(metrics_interval_s,), name="metrics", daemon=True).start()

    def close(self) -> None:
        """Publish no metrics any more."""
        self._stopped.set()

    def set_state(self, state: State, detail: dict[str, Any]) -> None:
        """Publish ``{"state": state, **detail}``, from now on."""
        with self._lock:
            self._state = state
            self._detail = detail
            self._publish_status()

    def set_power(self, level: PowerLevel) -> None:
        """Add the level of heat to the status, from now on."""
        with self._lock:
            self._power = level
            self._publish_status()

    def set_info(self, info: dict[str, Any]) -> None:
        """Publish what this node serves, now and on every connection."""
        with self._lock:
            self._info = msgspec.json.encode({**info, "v": 1, "node": self._node})
            if self._link.connected:
                self._publish_retained(self._topics.info, self._info)

    def on_connected(self) -> None:
        """There is a new connection."""
        with self._lock:
            # The will may have replaced the status while we were away.
            self._publish_retained(self._topics.status, self._status)
            if self._info is not None:
                self._publish_retained(self._topics.info, self._info)

    def _publish_status(self) -> None:
        """With the lock held."""
        detail = self._detail if self._power == "normal" else {**self._detail, "power": self._power}
        self._status = encode_status(self._node, self._state, detail)
        if self._link.connected:
            self._publish_retained(self._topics.status, self._status)

    def _publish_retained(self, topic: str, payload: bytes) -> None:
        """Publish, unless the very same is still on its way: the link sends that again after a reconnection."""
        if self._pending.get(topic) == payload:
            return
        self._pending[topic] = payload

        def done(_delivered: bool) -> None:
            if self._pending.get(topic) == payload:
                del self._pending[topic]

        self._link.publish(Outgoing(topic, payload, qos=1, retain=True, content_type=CONTENT_TYPE, on_done=done))

    def _report_metrics(self, interval_s: float) -> None:
        while not self._stopped.wait(interval_s):
            try:
                payload = msgspec.json.encode({"v": 1, "node": self._node, **self._metrics.snapshot()})
                self._link.publish(Outgoing(self._topics.metrics, payload, content_type=CONTENT_TYPE))
            except Exception:  # a gauge that fails once must not end the reports
                log.exception("the metrics could not be published")
