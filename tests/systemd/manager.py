"""What systemd's side of sd_notify hears, on a real datagram socket."""

from __future__ import annotations

import secrets
import socket
import time
from pathlib import Path


class FakeManager:
    """A socket that a daemon tells how it is.

    Args:
        folder: for the socket; None makes an abstract one.
    """

    def __init__(self, folder: Path | None) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        if folder is None:
            self.address = f"@edge-llm-test-{secrets.token_hex(8)}"
            self._socket.bind("\0" + self.address[1:])
        else:
            self.address = str(folder / "notify")
            self._socket.bind(self.address)

    def __enter__(self) -> FakeManager:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def next(self, timeout_s: float = 30.0) -> list[str]:
        """The lines of the next datagram. Raises ``TimeoutError``."""
        self._socket.settimeout(timeout_s)
        return self._socket.recv(4096).decode().split("\n")

    def until(self, line: str, timeout_s: float = 30.0) -> list[list[str]]:
        """Every datagram up to the one with ``line``. Raises ``TimeoutError``."""
        heard: list[list[str]] = []
        deadline = time.monotonic() + timeout_s
        while not heard or line not in heard[-1]:
            heard.append(self.next(max(0.01, deadline - time.monotonic())))
        return heard

    def hears(self, line: str, within_s: float) -> bool:
        """Whether ``line`` comes within the time."""
        try:
            self.until(line, within_s)
        except TimeoutError:
            return False
        return True
