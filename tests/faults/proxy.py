"""A TCP proxy in front of a broker, whose link can be slow, cut, half-open or reset."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from typing import Final

_BLOCK_BYTES: Final = 16_384
_LINGER_NEVER: Final = struct.pack("ii", 1, 0)  # close() sends RST (socket(7), SO_LINGER)


class Proxy:
    """Forwards every connection to a port of 127.0.0.1, with one thread for each direction.

    Attributes:
        port: where it listens.
        delay_s: added to every block that passes, in either direction.
        bytes_per_s: the most that passes in a direction of a connection; None is no bound.
        connections: so many have been accepted.
    """

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.delay_s = 0.0
        self.bytes_per_s: float | None = None
        self.connections = 0
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._lock = threading.Lock()
        self._refusing = False
        self._flowing = threading.Event()
        self._flowing.set()
        self._closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def heal(self) -> None:
        """Forward again, at full speed, new connections and those that still stand."""
        self.delay_s, self.bytes_per_s = 0.0, None
        self._refusing = False
        self._flowing.set()

    def half_open(self) -> None:
        """Nothing passes any more, in either direction, and nobody is told. New connections fare the same."""
        self._flowing.clear()

    def cut(self, *, for_good: bool = False) -> None:
        """End every connection in good order (FIN); with ``for_good`` new ones end at once, until ``heal``."""
        self._refusing = for_good
        for ends in self._take_pairs():
            for end in ends:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def reset(self) -> None:
        """Break every connection off (RST)."""
        for ends in self._take_pairs():
            for end in ends:
                with contextlib.suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NEVER)
                    # Its thread may sit in recv, where a close alone would not reach it.
                    end.close()

    def close(self) -> None:
        self._closed = True
        self._flowing.set()
        self.cut(for_good=True)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _take_pairs(self) -> list[tuple[socket.socket, socket.socket]]:
        with self._lock:
            pairs, self._pairs = self._pairs, []
        return pairs

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
                if self._refusing:
                    client.close()
                    continue
                server = socket.create_connection(("127.0.0.1", self._target_port))
            except OSError:
                if not self._closed:
                    continue  # the broker is away
                return
            for sock in (client, server):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.settimeout(0.05)
            with self._lock:
                self._pairs.append((client, server))
            self.connections += 1
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while not self._closed:
                self._flowing.wait()
                try:
                    block = source.recv(256 if self.bytes_per_s else _BLOCK_BYTES)
                except TimeoutError:
                    continue
                if not block:
                    break
                if self.delay_s:
                    time.sleep(self.delay_s)
                self._flowing.wait()
                self._send(sink, block)
                if self.bytes_per_s:
                    time.sleep(len(block) / self.bytes_per_s)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _send(self, sink: socket.socket, block: bytes) -> None:
        rest = memoryview(block)
        while rest and not self._closed:
            with contextlib.suppress(TimeoutError):
                rest = rest[sink.send(rest) :]
