"""mosquitto with the files of examples/mosquitto, and clients that have proven their name to it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final

from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from benchmarks.serving import NODE, ServingError, set_nodelay
from edge_llm.local_broker import LocalBroker, free_port, mosquitto_path

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from paho.mqtt.client import MQTTMessage

_EXAMPLE: Final = Path(__file__).parent.parent.parent / "examples" / "mosquitto"
_KEEPALIVE_S: Final = 30
_RECONNECT_MIN_S: Final = 1
_RECONNECT_MAX_S: Final = 2
DAEMON_USER: Final = "edge"
HOST_USER: Final = "host"


class ExampleBroker(LocalBroker):
    """mosquitto as examples/mosquitto sets it up, but for port, folders, node and the TLS listener, which is left out.

    Args:
        folder: for its files and its data.
        users: who may connect beside the daemon and the host; ``password_of`` gives their passwords.

    Raises:
        ServingError: mosquitto is not installed.
    """

    name = "mosquitto"

    def __init__(self, folder: Path, users: Sequence[str]) -> None:
        executable = mosquitto_path()
        if executable is None or shutil.which("mosquitto_passwd") is None:
            raise ServingError("mosquitto and mosquitto_passwd are needed: apt-get install mosquitto")
        port = free_port()
        paragraphs = (_EXAMPLE / "mosquitto.conf").read_text().split("\n\n")
        text = "\n\n".join(paragraph for paragraph in paragraphs if "listener 8883" not in paragraph)
        text = text.replace("listener 1883 127.0.0.1", f"listener {port} 127.0.0.1")
        text = text.replace("/etc/mosquitto", str(folder)).replace("/var/lib/mosquitto", str(folder / "data"))
        if os.geteuid() == 0:
            text += "user root\n"  # otherwise it becomes the user mosquitto, who cannot read the folder
        (folder / "data").mkdir()
        config = folder / "mosquitto.conf"
        config.write_text(text)
        acl = (_EXAMPLE / "acl").read_text().replace("edge_llm/v1/edge/", f"edge_llm/v1/{NODE}/")
        (folder / "acl").write_text(acl)
        passwords = folder / "passwords"
        passwords.touch(mode=0o600)
        passwords.write_text("".join(f"{user}:{password_of(user)}\n" for user in (DAEMON_USER, HOST_USER, *users)))
        subprocess.run(["mosquitto_passwd", "-U", str(passwords)], check=True, capture_output=True)
        super().__init__(folder, port, [executable, "-c", str(config)])


def password_of(user: str) -> str:
    """The password of a user of this broker, which lives for one run on 127.0.0.1."""
    return f"{user}-of-the-soak"


def make_client(
    user: str,
    on_message: Callable[[MQTTMessage], None],
    topics: Sequence[str],
    on_subscribe: Callable[[], None] = lambda: None,
    *,
    comes_back: bool = True,
) -> Client:
    """An MQTT 5 client of a user that subscribes to ``topics`` on each connection, not yet connected.

    Args:
        user: who it is.
        on_message: called with each message on the client's thread.
        topics: filters, with QoS 1.
        on_subscribe: called when the broker has confirmed them.
        comes_back: connect again when the connection is lost.
    """
    client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5, reconnect_on_failure=comes_back)
    client.username_pw_set(user, password_of(user))
    client.max_inflight_messages_set(0)
    client.reconnect_delay_set(_RECONNECT_MIN_S, _RECONNECT_MAX_S)
    client.on_socket_open = set_nodelay
    client.on_message = lambda _client, _userdata, message: on_message(message)
    client.on_connect = lambda client, *_: client.subscribe([(topic, 1) for topic in topics])
    client.on_subscribe = lambda *_: on_subscribe()
    return client


def connect(client: Client, port: int) -> None:
    """Connect to the broker on 127.0.0.1 and start the client's thread. Raises ``OSError``."""
    client.connect("127.0.0.1", port, _KEEPALIVE_S)
    client.loop_start()
