"""Making a paho client for one protocol version, and translating between its messages and ours.

Only this file and client.py know paho.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from edge_llm.config import refuse_if_open_to_all
from edge_llm.errors import ConfigError
from edge_llm.mqtt.messages import Incoming

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge_llm.config import MqttConfig, TlsConfig
    from edge_llm.mqtt.acks import Delivery

Protocol = Literal["5", "3.1.1"]
# How long a TCP connection and TLS handshake may take; the link's thread does nothing else meanwhile.
CONNECT_TIMEOUT_S: Final = 5.0
_NO_RETAINED: Final = 2  # SubscribeOptions.RETAIN_DO_NOT_SEND


@dataclass(frozen=True)
class Outgoing:
    """One message to publish.

    ``on_done`` is called on the link's thread: True once the broker has it (QoS 1: its PUBACK), False if it never will.
    The properties are left out towards a 3.1.1 broker.
    """

    topic: str
    payload: bytes
    qos: int = 0
    retain: bool = False
    content_type: str | None = None
    correlation: bytes | None = None
    response_topic: str | None = None
    on_done: Callable[[bool], None] | None = None


@dataclass(frozen=True)
class Session:
    """Who we are to the broker, and what it should keep for us.

    Attributes:
        client_id: names the session.
        subscriptions: (topic filter, QoS), renewed on every connection.
        will: what the broker publishes when we vanish.
        expiry_s: how long the broker keeps the session while we are away; 0: not at all.
        receive_maximum: the most unacknowledged messages that the broker sends (MQTT 5).
        max_packet_bytes: the broker withholds anything larger (MQTT 5), so that no packet exhausts the memory.
        retained: whether retained messages are wanted when a subscription is made.
    """

    client_id: str
    subscriptions: tuple[tuple[str, int], ...]
    will: Outgoing | None = None
    expiry_s: int = 0
    receive_maximum: int = 65_535
    max_packet_bytes: int | None = None
    retained: bool = False


@dataclass(frozen=True)
class Credentials:
    """What proves who we are: read once from the files that the settings name."""

    username: str | None
    password: str | None
    tls: ssl.SSLContext | None

    @classmethod
    def load(cls, config: MqttConfig) -> Credentials:
        """Read the password and the TLS files.

        Raises:
            ConfigError: a file cannot be used, or every user of the machine may read a secret; the message names it.
        """
        password = None
        if config.password_file is not None:
            if config.username is None:
                raise ConfigError("mqtt.password_file is set without mqtt.username")
            refuse_if_open_to_all("mqtt.password_file", config.password_file)
            try:
                password = Path(config.password_file).read_text(encoding="utf-8").rstrip("\r\n")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"mqtt.password_file {config.password_file} cannot be read: {error}") from None
        return cls(config.username, password, _tls_context(config.tls) if config.tls.enabled else None)


def make_client(session: Session, protocol: Protocol, credentials: Credentials) -> Client:
    """A paho client that has not connected yet, without callbacks.

    It is driven by one thread of ours, not by paho's: paho would let another thread's PUBLISH out before the CONNECT
    of a new connection, holds its locks while it calls back, and cannot jitter its back-off.
    """
    version = MQTTProtocolVersion.MQTTv5 if protocol == "5" else MQTTProtocolVersion.MQTTv311
    client = Client(
        CallbackAPIVersion.VERSION2,
        client_id=session.client_id,
        # None in MQTT 5, where `connect` is told instead.
        clean_session=None if protocol == "5" else session.expiry_s == 0,
        protocol=version,
        # Otherwise paho falls back to MQTT 3.1 by itself, from inside a callback.
        reconnect_on_failure=False,
        manual_ack=True,
    )
    client.connect_timeout = CONNECT_TIMEOUT_S
    # The link keeps its own window; paho's would queue where we cannot see it.
    client.max_inflight_messages = 0
    if credentials.username is not None:
        client.username_pw_set(credentials.username, credentials.password)
    if credentials.tls is not None:
        client.tls_set_context(credentials.tls)
    if (will := session.will) is not None:
        properties = _properties(PacketTypes.WILLMESSAGE) if protocol == "5" else None
        if properties is not None and will.content_type is not None:
            properties.ContentType = will.content_type
        client.will_set(will.topic, will.payload, will.qos, will.retain, properties)
    client.on_socket_open = _disable_nagle
    return client


def connect(client: Client, config: MqttConfig, session: Session, protocol: Protocol) -> None:
    """Open the socket and send CONNECT. Raises ``OSError``; the CONNACK comes through ``on_connect``."""
    if protocol == "5":
        properties = _properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = session.expiry_s
        properties.ReceiveMaximum = session.receive_maximum
        if session.max_packet_bytes is not None:
            properties.MaximumPacketSize = session.max_packet_bytes
        client.connect(
            config.host, config.port, config.keepalive_s, clean_start=session.expiry_s == 0, properties=properties
        )
    else:
        client.connect(config.host, config.port, config.keepalive_s)


def subscribe(client: Client, session: Session, protocol: Protocol) -> None:
    """Ask for all the session's subscriptions, of which there is one at least; ``on_subscribe`` gets the answer."""
    if protocol == "5":
        handling = 0 if session.retained else _NO_RETAINED
        client.subscribe(
            [
                # A shared subscription has no retained messages, and some brokers refuse to be told not to send any.
                (
                    topic,
                    SubscribeOptions(
                        qos=qos,
                        # So that a query published as retained can be told from one that is not.
                        retainAsPublished=True,
                        retainHandling=0 if topic.startswith("$share/") else handling,
                    ),
                )
                for topic, qos in session.subscriptions
            ]
        )
    else:
        client.subscribe(list(session.subscriptions))


def publish_properties(message: Outgoing, protocol: Protocol) -> Properties | None:
    """The MQTT 5 properties of a message, None in 3.1.1."""
    if protocol != "5":
        return None
    properties = _properties(PacketTypes.PUBLISH)
    if message.content_type is not None:
        properties.ContentType = message.content_type
        properties.PayloadFormatIndicator = 1
    if message.correlation is not None:
        properties.CorrelationData = message.correlation
    if message.response_topic is not None:
        properties.ResponseTopic = message.response_topic
    return properties


def packet_bytes(message: Outgoing) -> int:
    """An upper bound of the size of the PUBLISH packet."""
    strings = (message.topic, message.content_type or "", message.response_topic or "")
    text_bytes = sum(len(text.encode("utf-8")) for text in strings)
    return len(message.payload) + text_bytes + len(message.correlation or b"") + 32


def to_incoming(message: MQTTMessage, delivery: Delivery | None) -> Incoming:
    """paho's message as ours. Raises ``UnicodeDecodeError`` if its topic is not UTF-8."""
    properties: Any = message.properties
    return Incoming(
        topic=message.topic,
        payload=bytes(message.payload),
        # paho stamps a message with time.monotonic() when it has read it.
        received_at=message.timestamp,
        qos=message.qos,
        retain=bool(message.retain),
        dup=bool(message.dup),
        content_type=getattr(properties, "ContentType", None),
        response_topic=getattr(properties, "ResponseTopic", None),
        correlation=getattr(properties, "CorrelationData", None),
        expiry_s=getattr(properties, "MessageExpiryInterval", None),
        delivery=delivery,
    )


def _properties(packet_type: int) -> Properties:
    return Properties(packet_type)  # type: ignore[no-untyped-call]


def _tls_context(tls: TlsConfig) -> ssl.SSLContext:
    # The key may stand in the certificate's file.
    if tls.key_file is not None:
        refuse_if_open_to_all("mqtt.tls.key_file", tls.key_file)
    elif tls.cert_file is not None:
        refuse_if_open_to_all("mqtt.tls.cert_file, which holds the key,", tls.cert_file)
    try:
        context = ssl.create_default_context(cafile=tls.ca_file)
        # Python's own defaults, but a system's OpenSSL configuration may say otherwise.
        context.minimum_version = max(context.minimum_version, ssl.TLSVersion.TLSv1_2)
        context.check_hostname = True
        if tls.cert_file is not None:
            context.load_cert_chain(tls.cert_file, tls.key_file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"mqtt.tls: the certificate or key files cannot be used: {error}") from None
    return context


def _disable_nagle(_client: Client, _userdata: Any, sock: Any) -> None:
    # Nagle's algorithm and delayed ACKs together would hold a small reply back for about 40 ms.
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
