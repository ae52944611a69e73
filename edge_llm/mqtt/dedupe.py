"""Remembering which queries have been seen, so that a repeated one runs once.

A client repeats a query when it is not sure that it arrived; the broker does when a connection was lost before the
acknowledgement. Both are recognised by (user, id) and the hash of the body.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge_llm.mqtt.acks import Delivery
    from edge_llm.mqtt.messages import Incoming
    from edge_llm.mqtt.replies import Reply

MAX_FINISHED: Final = 4096
MAX_FINISHED_BYTES: Final = 8 << 20
_MAX_MADE_IDS: Final = 1024
_MAX_SAME_BODY: Final = 64

Key = tuple[str, str]


def body_hash(payload: bytes) -> bytes:
    """What two payloads are compared by."""
    return hashlib.blake2b(payload, digest_size=16).digest()


@dataclass(frozen=True)
class Seen:
    """A query that runs or has finished."""

    body: bytes
    reply: Reply
    finished_at: float | None = None


class DedupeTable:
    """Running queries, and finished ones for a while. Thread-safe.

    Running ones are as many as the scheduler takes; finished ones leave after ``window_s``, or earlier, oldest first,
    when there are more than ``max_finished`` or their terminal events take more than ``max_finished_bytes``.
    """

    def __init__(
        self,
        window_s: float,
        *,
        max_finished: int = MAX_FINISHED,
        max_finished_bytes: int = MAX_FINISHED_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._window_s = window_s
        self._max_finished = max_finished
        self._max_finished_bytes = max_finished_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._running: dict[Key, Seen] = {}
        self._finished: OrderedDict[Key, Seen] = OrderedDict()
        self._finished_bytes = 0

    def find(self, key: Key) -> Seen | None:
        """The query of that user and id, if it runs or finished within the window."""
        with self._lock:
            self._forget_old()
            return self._running.get(key) or self._finished.get(key)

    def add(self, key: Key, body: bytes, reply: Reply) -> None:
        """A query begins."""
        with self._lock:
            self._drop(key)
            self._running[key] = Seen(body, reply)

    def finish(self, key: Key, *, keep: bool) -> None:
        """A query has its terminal event. With ``keep`` false it is forgotten, so that a retry runs."""
        with self._lock:
            seen = self._running.pop(key, None)
            if seen is None or not keep:
                return
            self._finished[key] = Seen(seen.body, seen.reply, self._clock())
            self._finished_bytes += seen.reply.terminal_bytes
            self._forget_old()

    def forget(self, concerns: Callable[[str], bool]) -> None:
        """Forget the finished queries of some users, and their answers: such a query runs again if it is repeated."""
        with self._lock:
            for key in [key for key in self._finished if concerns(key[0])]:
                self._drop(key)

    def __len__(self) -> int:
        with self._lock:
            return len(self._running) + len(self._finished)

    def _forget_old(self) -> None:
        now = self._clock()
        while self._finished:
            key, seen = next(iter(self._finished.items()))
            fresh = seen.finished_at is not None and now - seen.finished_at < self._window_s
            within_bounds = (
                len(self._finished) <= self._max_finished and self._finished_bytes <= self._max_finished_bytes
            )
            if fresh and within_bounds:
                return
            self._drop(key)

    def _drop(self, key: Key) -> None:
        seen = self._finished.pop(key, None)
        if seen is not None:
            self._finished_bytes -= seen.reply.terminal_bytes


class MadeIds:
    """Ids for queries that bring none. A copy that the broker delivers again gets the id of the first.

    Such a copy has no id to be recognised by, and its packet id may differ: it is the same topic and body, marked as
    a duplicate, on a later connection. Used by the link's thread only.
    """

    def __init__(self) -> None:
        self._made: OrderedDict[bytes, deque[tuple[str, Delivery]]] = OrderedDict()

    def make(self, incoming: Incoming) -> str:
        """An id for this message."""
        if incoming.delivery is None:
            return secrets.token_hex(8)
        key = body_hash(incoming.topic.encode() + b"\0" + incoming.payload)
        same_body = self._made.setdefault(key, deque(maxlen=_MAX_SAME_BODY))
        made = secrets.token_hex(8)
        if incoming.dup:
            for index, (earlier, delivery) in enumerate(same_body):
                if delivery.connection != incoming.delivery.connection:
                    made = earlier
                    del same_body[index]
                    break
        same_body.append((made, incoming.delivery))
        self._made.move_to_end(key)
        if len(self._made) > _MAX_MADE_IDS:
            self._made.popitem(last=False)
        return made
