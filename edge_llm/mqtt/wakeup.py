"""Waking a thread that waits in ``poll``."""

from __future__ import annotations

import contextlib
import socket


class Wakeup:
    """A file descriptor that becomes readable when ``wake`` is called, from any thread."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._sent = False

    def fileno(self) -> int:
        """The descriptor to wait for."""
        return self._reader.fileno()

    def wake(self) -> None:
        """Make it readable. Whatever the thread is to see must be in place before."""
        # The waiting thread clears the flag first and looks second, so nothing is missed and one byte is enough.
        if not self._sent:
            self._sent = True
            with contextlib.suppress(OSError):
                self._writer.send(b"\0")

    def clear(self) -> None:
        """To be called by the waiting thread before it looks at what is new."""
        with contextlib.suppress(BlockingIOError):
            self._reader.recv(4096)
        self._sent = False

    def close(self) -> None:
        """Free the descriptors."""
        self._reader.close()
        self._writer.close()
