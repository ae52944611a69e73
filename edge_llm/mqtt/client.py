"""The link to the broker: one thread that owns the socket, and a queue into it.

    any thread ── publish ──► waiting ──► the link's thread ──► socket
                                               │  ▲
              on_message, on_connected, on_done ◄─┘

Only the link's thread touches paho, so nothing is published before CONNECT, no lock is held across a publish, and an
acknowledgement cannot land on another connection than its message's.
"""

from __future__ import annotations

import logging
import select
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage
from paho.mqtt.enums import MQTTErrorCode

from edge_llm.mqtt.acks import AckQueue, Delivery
from edge_llm.mqtt.connection import (
    Credentials,
    Outgoing,
    Protocol,
    Session,
    connect,
    make_client,
    packet_bytes,
    publish_properties,
    subscribe,
    to_incoming,
)
from edge_llm.mqtt.in_flight import MAX_HANG_UPS, InFlight
from edge_llm.mqtt.patience import Patience
from edge_llm.mqtt.wakeup import Wakeup
from edge_llm.notify import Heartbeat

if TYPE_CHECKING:
    from collections.abc import Callable

    from paho.mqtt.properties import Properties
    from paho.mqtt.reasoncodes import ReasonCode

    from edge_llm.config import MqttConfig
    from edge_llm.metrics import Metrics
    from edge_llm.mqtt.messages import Incoming

log = logging.getLogger(__name__)

# QoS 1 messages in flight to the broker; mosquitto's own default, and less if the broker's Receive Maximum is less.
_WINDOW: Final = 20
# While there is no connection, the thread stirs this often.
_PAUSE_TICK_S: Final = 1.0
_READABLE: Final = select.POLLIN | select.POLLHUP | select.POLLERR | select.POLLNVAL


class MqttLink:
    """A connection to the broker that comes back by itself.

    QoS 1 messages wait, without bound, until the broker has acknowledged them, across reconnections: there is one per
    query at most, so the bound on queries bounds them. QoS 0 messages are refused while the link is down or
    ``max_outgoing`` messages wait.

    Args:
        config: where the broker is.
        session: who we are to it.
        on_message: called on the link's thread with each message; it hands every ``delivery`` to ``acknowledge`` in
            the end. It must not block.
        on_connected: called on the link's thread after each connection, once subscriptions have been asked for.
        metrics: counts what is sent, refused and lost.

    Attributes:
        heartbeat: touched by the link's thread, every few seconds unless an attempt to connect takes longer.

    Raises:
        ConfigError: the password or TLS files cannot be used.
    """

    def __init__(
        self,
        config: MqttConfig,
        session: Session,
        on_message: Callable[[Incoming], None],
        on_connected: Callable[[], None],
        metrics: Metrics,
    ) -> None:
        self._config = config
        self._session = session
        self._on_message = on_message
        self._on_connected = on_connected
        self._metrics = metrics
        self._credentials = Credentials.load(config)
        self._protocol: Protocol = "3.1.1" if config.protocol == "3.1.1" else "5"
        self._protocol_accepted = config.protocol != "auto"
        self._waiting: deque[tuple[float, Outgoing]] = deque()
        self._in_flight = InFlight()
        self._acks = AckQueue()
        self._window = _WINDOW
        self._broker_max_packet_bytes: int | None = None
        self._connack_seen = False
        self._accepted = False
        self._session_resumed = False
        self._reading = False
        self._client: Client | None = None
        self._connected = threading.Event()
        self._closing = threading.Event()
        self._close_by = 0.0
        self._wakeup = Wakeup()
        self._patience = Patience(config, session.client_id)
        self._trouble: str | None = None
        self.heartbeat = Heartbeat()
        self._thread = threading.Thread(target=self._run, name="mqtt-link", daemon=True)

    # -- for every thread ---------------------------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """The broker has accepted us and our subscriptions, and the connection stands."""
        return self._connected.is_set()

    @property
    def protocol(self) -> str:
        """The protocol version in use, or being tried."""
        return self._protocol

    @property
    def trouble(self) -> str | None:
        """Why there is no connection, in words; None if all is well or nothing is known yet."""
        return self._trouble

    @property
    def backlog(self) -> int:
        """Messages that wait to be written to the socket."""
        return len(self._waiting)

    def start(self) -> None:
        """Connect in the background, and again whenever the connection is lost."""
        self._thread.start()

    def wait_connected(self, timeout_s: float) -> bool:
        """Wait until the broker has accepted us; False if it has not within ``timeout_s``."""
        return self._connected.wait(timeout_s)

    def publish(self, message: Outgoing) -> bool:
        """Queue a message. False: it was refused, which happens to QoS 0 only and means that it will not be sent."""
        if message.qos == 0 and (not self.connected or len(self._waiting) >= self._config.max_outgoing):
            return False
        self._waiting.append((time.monotonic(), message))
        self._wakeup.wake()
        return True

    def close(self, timeout_s: float) -> None:
        """Send what waits, for at most ``timeout_s``, and disconnect. The broker keeps the session, if it should."""
        self._close_by = time.monotonic() + timeout_s
        self._closing.set()
        self._wakeup.wake()
        if self._thread.is_alive():
            # A connection attempt in progress ends by its own timeout; the thread is a daemon, so it can be left.
            self._thread.join(timeout_s + 1.0)
        if unsent := len(self._waiting) + len(self._in_flight):
            log.warning("closed the connection with %d messages that the broker has not acknowledged", unsent)

    # -- for the link's thread ----------------------------------------------------------------------------------------

    def acknowledge(self, delivery: Delivery | None) -> None:
        """Say that a message has been dealt with. Its PUBACK follows when those before it have gone, or never if
        its connection is gone. To be called on the link's thread, that is in ``on_message`` or ``on_done``.
        """
        if delivery is None or self._client is None:
            return
        for mid in self._acks.finish(delivery):
            self._client.ack(mid, 1)

    def _run(self) -> None:
        while not self._closing.is_set():
            started_at = time.monotonic()
            try:
                self._connect_and_serve()
            except Exception:  # whatever a broker sends, the link goes on, with a fresh client
                self._metrics.count("internal_errors")
                log.exception("the MQTT link failed and starts over")
                self._change_protocol(self._protocol)
            lasted_s = time.monotonic() - started_at
            self._patience.note_end(lasted_s, was_accepted=self._accepted, wanted=self._closing.is_set())
            if self._accepted and not self._closing.is_set():
                self._give_up_after(lasted_s)
            self._pause(self._patience.wait_s(lasted_s, was_answered=self._connack_seen))
        self._wakeup.close()

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        self.heartbeat.beat()
        while (left_s := until - time.monotonic()) > 0 and not self._closing.wait(min(left_s, _PAUSE_TICK_S)):
            self.heartbeat.beat()

    def _connect_and_serve(self) -> None:
        self._connack_seen = self._accepted = False
        self._acks.new_connection()
        try:
            client = self._open()
            self._serve(client)
        except (OSError, ValueError) as error:
            self._report_trouble(f"cannot reach the broker at {self._address}: {error}")
            return
        finally:
            self._connected.clear()
        if self._connack_seen or self._closing.is_set():
            return
        self._report_trouble(f"the broker at {self._address} closed the connection before accepting it")
        if not self._protocol_accepted:
            # Some brokers hang up on a version that they do not know instead of refusing it.
            self._change_protocol("3.1.1" if self._protocol == "5" else "5")
            log.info("trying MQTT %s", self._protocol)

    def _open(self) -> Client:
        if self._client is None:
            client = make_client(self._session, self._protocol, self._credentials)
            client.on_connect = self._handle_connect
            client.on_disconnect = self._handle_disconnect
            client.on_message = self._handle_message
            client.on_publish = self._handle_publish
            client.on_subscribe = self._handle_subscribe
            self._client = client
            connect(client, self._config, self._session, self._protocol)
        else:
            # paho sends what the broker has not acknowledged again, with the same packet ids, as MQTT demands.
            self._client.reconnect()
        return self._client

    def _serve(self, client: Client) -> None:
        """Read and write until the connection ends."""
        sock: Any = client.socket()
        poller = select.poll()
        poller.register(self._wakeup, select.POLLIN)
        if sock is not None:
            poller.register(sock, select.POLLIN)
        # Often enough to notice a missing PINGRESP; nothing else needs a tick.
        tick_ms = int(1000 * min(5.0, self._config.keepalive_s / 4))
        while client.socket() is not None:
            self.heartbeat.beat()
            self._write(client)
            if client.socket() is None or self._finished_closing(client):
                return
            poller.modify(sock, select.POLLIN | (select.POLLOUT if client.want_write() else 0))
            # TLS may hold decrypted bytes that poll cannot see.
            buffered = hasattr(sock, "pending") and sock.pending() > 0
            ready = dict(poller.poll(0 if buffered else 50 if self._closing.is_set() else tick_ms))
            if ready.pop(self._wakeup.fileno(), 0):
                self._wakeup.clear()
            if buffered or any(events & _READABLE for events in ready.values()):
                self._reading = True
                try:
                    client.loop_read()
                finally:
                    self._reading = False
            client.loop_misc()

    def _write(self, client: Client) -> None:
        """Hand what waits to paho, as long as the socket takes it."""
        if client.want_write():
            client.loop_write()
        while self._waiting and self.connected and not client.want_write():
            queued_at, message = self._waiting[0]
            if message.qos and len(self._in_flight) >= self._window:
                return
            self._waiting.popleft()
            if self._broker_max_packet_bytes is not None and packet_bytes(message) > self._broker_max_packet_bytes:
                self._lose(message, f"larger than the {self._broker_max_packet_bytes} bytes that the broker takes")
                continue
            info = client.publish(
                message.topic, message.payload, message.qos, message.retain, publish_properties(message, self._protocol)
            )
            if info.rc == MQTTErrorCode.MQTT_ERR_QUEUE_SIZE:
                # The packet id is still in use by a message 65,535 ids ago: the next one is not.
                self._waiting.appendleft((queued_at, message))
                continue
            self._metrics.observe("publish_lag_ms", (time.monotonic() - queued_at) * 1000)
            if message.qos:
                self._in_flight.add(info.mid, message)
            elif message.on_done is not None:
                self._guard(message.on_done, info.rc == MQTTErrorCode.MQTT_ERR_SUCCESS)

    def _finished_closing(self, client: Client) -> bool:
        if not self._closing.is_set():
            return False
        if self.connected and (self._waiting or self._in_flight) and time.monotonic() < self._close_by:
            return False
        client.disconnect()
        client.loop_write()
        return True

    # -- paho's callbacks, on the link's thread -----------------------------------------------------------------------

    def _handle_connect(
        self, client: Client, _userdata: Any, flags: ConnectFlags, reason: ReasonCode, properties: Properties | None
    ) -> None:
        self._connack_seen = True
        if reason.is_failure:
            self._handle_refusal(reason)
            return
        self._accepted = self._protocol_accepted = True
        self._window = min(_WINDOW, getattr(properties, "ReceiveMaximum", _WINDOW))
        self._broker_max_packet_bytes = getattr(properties, "MaximumPacketSize", None)
        self._session_resumed = flags.session_present
        # Always, not only without a session: an upgraded daemon may listen to more than the session knows.
        subscribe(client, self._session, self._protocol)

    def _handle_refusal(self, reason: ReasonCode) -> None:
        text = str(reason)
        if text == "Unsupported protocol version" and self._config.protocol == "auto" and self._protocol == "5":
            log.info("the broker at %s does not speak MQTT 5: falling back to 3.1.1", self._address)
            self._change_protocol("3.1.1")
            return
        hint = ""
        if text in ("Bad user name or password", "Not authorized"):
            hint = "; check mqtt.username and mqtt.password_file, and the broker's ACL"
        self._report_trouble(f"the broker at {self._address} refused the connection: {text}{hint}")

    def _handle_disconnect(
        self, _client: Client, _userdata: Any, flags: DisconnectFlags, reason: ReasonCode, _properties: Any
    ) -> None:
        was_connected = self._connected.is_set()
        self._connected.clear()
        if self._closing.is_set() or not was_connected:
            return
        text = str(reason)
        if flags.is_disconnect_packet_from_server and text == "Session taken over":
            text += (
                f": another client is connected with the id {self._session.client_id!r}; each node needs its own name"
            )
        self._metrics.count("connections_lost")
        self._report_trouble(f"lost the connection to the broker at {self._address}: {text}")

    def _handle_message(self, _client: Client, _userdata: Any, message: MQTTMessage) -> None:
        delivery = self._acks.receive(message.mid) if message.qos else None
        try:
            incoming = to_incoming(message, delivery)
        except UnicodeDecodeError:
            self._metrics.count("messages_ignored")
            self.acknowledge(delivery)
            return
        self._guard(self._on_message, incoming)

    def _handle_publish(self, _client: Client, _userdata: Any, mid: int, reason: ReasonCode, _properties: Any) -> None:
        # paho calls this for a QoS 0 message too, when it is written, and its id may equal one in flight.
        message = self._in_flight.take(mid) if self._reading else None
        if message is None:
            return
        if reason.is_failure:
            self._lose(message, f"refused by the broker: {reason}")
        elif message.on_done is not None:
            self._guard(message.on_done, True)

    def _handle_subscribe(
        self, _client: Client, _userdata: Any, _mid: int, reasons: list[ReasonCode], _properties: Any
    ) -> None:
        log.info(
            "connected to the broker at %s (MQTT %s, session %s)",
            self._address,
            self._protocol,
            "resumed" if self._session_resumed else "new",
        )
        self._trouble = None
        for (topic, _qos), reason in zip(self._session.subscriptions, reasons, strict=False):
            if reason.is_failure:
                self._report_trouble(f"the broker refused the subscription to {topic}: {reason}; check its ACL")
        self._metrics.count("connections")
        self._connected.set()
        self._guard(self._on_connected)

    # -- small things -------------------------------------------------------------------------------------------------

    @property
    def _address(self) -> str:
        return f"{self._config.host}:{self._config.port}"

    def _change_protocol(self, protocol: Protocol) -> None:
        """Start over with another client; what the old one had in flight is sent again."""
        self._protocol = protocol
        self._client = None
        now = time.monotonic()
        self._waiting.extendleft((now, message) for message in reversed(self._in_flight.take_all()))

    def _give_up_after(self, lasted_s: float) -> None:
        """Lose the messages that the broker has hung up on too often."""
        given_up = self._in_flight.after_connection(lasted_s)
        for message in given_up:
            self._lose(message, f"the broker hung up on it {MAX_HANG_UPS} times")
        if given_up:
            # paho would send them again; a fresh client does not know them.
            self._change_protocol(self._protocol)

    def _lose(self, message: Outgoing, why: str) -> None:
        self._metrics.count("publishes_lost")
        log.error("a message to %s is lost: %s", message.topic, why)
        if message.on_done is not None:
            self._guard(message.on_done, False)

    def _report_trouble(self, text: str) -> None:
        # Once for as long as it stays the same: the attempts go on every few seconds.
        if text != self._trouble:
            log.warning("%s", text)
        self._trouble = text

    def _guard(self, callback: Callable[..., None], *arguments: Any) -> None:
        try:
            callback(*arguments)
        except Exception:  # an exception here would end the link's thread and with it the daemon's hearing
            self._metrics.count("internal_errors")
            log.exception("a callback of the MQTT link failed")
