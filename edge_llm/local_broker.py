"""A broker on this machine for the demo and the tests: mosquitto if it is installed, otherwise the iotcore wheel.

Both listen on 127.0.0.1 only, on a free port, and end with ``stop`` or with the ``with`` block.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

from edge_llm.errors import EdgeLlmError

if TYPE_CHECKING:
    from types import TracebackType
    from typing import TypeVar

    BrokerT = TypeVar("BrokerT", bound="LocalBroker")

START_TIMEOUT_S: Final = 10.0
STOP_TIMEOUT_S: Final = 10.0
_SYSTEM_FOLDERS: Final = "/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin"

_IOTCORE_TOML: Final = """\
id = 0

[router]
id = 0
max_connections = 100
max_outgoing_packet_count = 200
max_segment_size = 104857600
max_segment_count = 10

[{version}.1]
name = "{version}-1"
listen = "127.0.0.1:{port}"
next_connection_delay_ms = 1

    [{version}.1.connections]
    connection_timeout_ms = 60000
    max_payload_size = 1048576
    max_inflight_count = 100
    dynamic_filters = true
"""
_IOTCORE_MAIN: Final = "import sys, iotcore; iotcore.Broker(config_path=sys.argv[1]).run_forever()"


class LocalBroker:
    """A broker process. ``port`` stays the same when it is killed and started again.

    Args:
        folder: holds its configuration and its log.
        command: starts it.
    """

    name = "broker"

    def __init__(self, folder: Path, port: int, command: list[str]) -> None:
        self.folder = folder
        self.port = port
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self: BrokerT) -> BrokerT:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self: BrokerT) -> BrokerT:
        """Start it and wait until it accepts connections. Raises ``EdgeLlmError`` with its log if it does not."""
        with (self.folder / "broker.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                start_new_session=True,  # Ctrl-C in the terminal is for whoever started it
            )
        give_up_at = time.monotonic() + START_TIMEOUT_S
        while not self._accepts():
            if self._process.poll() is not None or time.monotonic() > give_up_at:
                self.stop()
                raise EdgeLlmError(f"{self.name} did not start: {self.log().strip() or 'it said nothing'}")
            time.sleep(0.01)
        return self

    def kill(self) -> None:
        """End it at once (SIGKILL): it says goodbye to nobody and saves nothing."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End it in good order."""
        self._end(signal.SIGTERM)

    def log(self) -> str:
        """What it has printed so far."""
        return (self.folder / "broker.log").read_text(errors="replace")

    def _end(self, how: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(how)
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(STOP_TIMEOUT_S)
        self._process = None

    def _accepts(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=0.5):
                return True
        except OSError:
            return False


class Mosquitto(LocalBroker):
    """mosquitto with anonymous access, unless ``settings`` (lines of mosquitto.conf) say otherwise."""

    name = "mosquitto"

    def __init__(self, folder: Path, *settings: str, anonymous: bool = True) -> None:
        executable = mosquitto_path()
        if executable is None:
            raise EdgeLlmError("mosquitto is not installed: apt-get install mosquitto")
        port = free_port()
        lines = [
            # This one is only allowed ahead of every listener.
            *(line for line in settings if line.startswith("per_listener_settings")),
            f"listener {port} 127.0.0.1",
            f"allow_anonymous {'true' if anonymous else 'false'}",
            "set_tcp_nodelay true",
            "connection_messages true",
            # Its stdout is buffered in blocks.
            "log_dest stderr",
            "log_type all",
            *(line for line in settings if not line.startswith("per_listener_settings")),
        ]
        if os.geteuid() == 0:
            # Otherwise it becomes the user mosquitto, who cannot read the folder.
            lines.append("user root")
        config = folder / "mosquitto.conf"
        config.write_text("\n".join(lines) + "\n")
        super().__init__(folder, port, [executable, "-c", str(config)])


class IotCore(LocalBroker):
    """rumqttd from the iotcore wheel, with one listener that speaks MQTT 5 or 3.1.1 only."""

    name = "iotcore"

    def __init__(self, folder: Path, *, mqtt5: bool = True) -> None:
        port = free_port()
        config = folder / "iotcore.toml"
        config.write_text(_IOTCORE_TOML.format(version="v5" if mqtt5 else "v4", port=port))
        # Not the current folder on the path: it may hold an `export` or a `tests` of its own.
        isolation = "-P" if sys.version_info >= (3, 11) else "-s"
        super().__init__(folder, port, [sys.executable, isolation, "-c", _IOTCORE_MAIN, str(config)])


def local_broker(folder: Path) -> LocalBroker:
    """The best broker that this machine has, not yet started. Raises ``EdgeLlmError`` if there is none."""
    if mosquitto_path() is not None:
        return Mosquitto(folder)
    if find_spec("iotcore") is not None:
        return IotCore(folder)
    raise EdgeLlmError("no broker here: apt-get install mosquitto, or pip install 'edge-llm[demo]'")


def mosquitto_path() -> str | None:
    """Where mosquitto is; some systems keep it out of a user's PATH."""
    return shutil.which("mosquitto") or shutil.which("mosquitto", path=_SYSTEM_FOLDERS)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
