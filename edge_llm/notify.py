"""Telling systemd how the daemon is: ready, what it does, stopping, and that its threads still move.

The protocol is one datagram of ``NAME=value`` lines to the socket in ``$NOTIFY_SOCKET``: sd_notify(3), which promises
to keep it stable for programs that speak it themselves, and sd_watchdog_enabled(3). Without the socket nothing is sent.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_log = logging.getLogger(__name__)

# systemd reads at once; should it not, the daemon must not wait for it.
_SEND_TIMEOUT_S: Final = 1.0
# So often within the time after which systemd gives us up.
_PINGS_PER_TIMEOUT: Final = 3


class Notifier:
    """The way to systemd. One thread uses it.

    Args:
        address: a path, or ``@`` and the name of an abstract socket; None or "" sends nothing.
    """

    def __init__(self, address: str | None) -> None:
        self._address = address
        self._status = ""

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Notifier:
        """The one that systemd has named in ``NOTIFY_SOCKET``, if it has."""
        return cls(environ.get("NOTIFY_SOCKET"))

    def ready(self, status: str) -> None:
        """Loaded: queries are answered from now on, as soon as the broker lets them through."""
        self._status = status
        self._send("READY=1", _status_line(status))

    def status(self, text: str) -> None:
        """The line that ``systemctl status`` shows; sent if it is another one than before."""
        if text != self._status:
            self._status = text
            self._send(_status_line(text))

    def extend_start(self, seconds: float) -> None:
        """Ask for more time until ``ready``, counted from now."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def stopping(self, status: str) -> None:
        """The end has begun."""
        self._status = status
        self._send("STOPPING=1", _status_line(status))

    def alive(self) -> None:
        """One ping for the watchdog."""
        self._send("WATCHDOG=1")

    def _send(self, *lines: str) -> None:
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as sock:
                sock.settimeout(_SEND_TIMEOUT_S)
                sock.sendto("\n".join(lines).encode(), address)
        except OSError as error:
            _log.warning("systemd could not be told %s at %s: %s", lines[0], self._address, error)


class Heartbeat:
    """Touched by one thread, each time round its loop; any other may see whether it has been.

    Attributes:
        count: how often.
    """

    def __init__(self) -> None:
        self.count = 0
        self._excused_until = -math.inf

    def beat(self) -> None:
        """The thread is here."""
        self.count += 1
        self._excused_until = -math.inf

    def excuse(self, seconds: float) -> None:
        """The thread is about to do something that may take so long without a beat; the next beat ends it."""
        self.beat()
        self._excused_until = time.monotonic() + seconds

    def has_moved(self, since: int) -> bool:
        """Whether the count is another one than ``since``, or the thread is excused."""
        return self.count != since or time.monotonic() < self._excused_until


class Watchdog:
    """Pings systemd a few times within its timeout, but only while every watched thread has moved since the last ping.

    Args:
        notifier: where the pings go.
        heartbeats: says what is watched at the moment, by the name of its thread.
        timeout_s: when systemd gives us up, see ``watchdog_timeout_s``; None: it does not watch us.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        notifier: Notifier,
        heartbeats: Callable[[], Mapping[str, Heartbeat]],
        timeout_s: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._notifier = notifier
        self._heartbeats = heartbeats
        self._clock = clock
        # By the heartbeat: a thread may get another name when another one ends.
        self._seen: dict[Heartbeat, int] = {}
        self._pinged_at = clock()
        self._complained = False
        self.interval_s = None if timeout_s is None else timeout_s / _PINGS_PER_TIMEOUT

    def tick(self) -> None:
        """Ping if it is time and everything has moved. To be called more often than every ``interval_s``."""
        if self.interval_s is None:
            return
        silent_s = self._clock() - self._pinged_at
        if silent_s < self.interval_s:
            return
        watched = self._heartbeats()
        still = [name for name, heartbeat in watched.items() if not heartbeat.has_moved(self._seen.get(heartbeat, 0))]
        if not still:
            self._seen = {heartbeat: heartbeat.count for heartbeat in watched.values()}
            self._pinged_at = self._clock()
            self._complained = False
            self._notifier.alive()
        elif silent_s >= 2 * self.interval_s and not self._complained:
            self._complained = True
            _log.error("no sign of life from %s for %.0f s: systemd is not told otherwise", ", ".join(still), silent_s)


def watchdog_timeout_s(environ: Mapping[str, str]) -> float | None:
    """Seconds without a ping after which systemd restarts this process; None if it does not watch it."""
    usec, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID")
    if not usec.isdecimal() or int(usec) == 0 or pid not in (None, str(os.getpid())):
        return None
    return int(usec) / 1e6


def _status_line(text: str) -> str:
    return "STATUS=" + " ".join(text.splitlines())
