"""Where queries go while one scheduler takes over from another: new ones to the new one, cancels to whose they are."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from edge_llm.errors import RequestError
from edge_llm.serving.active import refuse

if TYPE_CHECKING:
    from edge_llm.cache.erasure import Erasure
    from edge_llm.notify import Heartbeat
    from edge_llm.serving.request import Request
    from edge_llm.serving.scheduler import Scheduler

_RETRY_AFTER_MS = 1000


class Switchboard:
    """Looks like a scheduler to the gateway. Every method may be called from any thread."""

    def __init__(self) -> None:
        # Held while a query is handed over: a scheduler that was put aside has all the queries that it will get.
        self._lock = threading.Lock()
        self._current: Scheduler | None = None
        # The current one, and those that finish what they have accepted.
        self._all: tuple[Scheduler, ...] = ()

    def put(self, scheduler: Scheduler) -> None:
        """From now on queries go there; the one before keeps what it has, until it is dropped."""
        with self._lock:
            self._current = scheduler
            self._all = (*self._all, scheduler)

    def drop(self, scheduler: Scheduler) -> None:
        """Forget a scheduler that has come to its end."""
        with self._lock:
            self._all = tuple(other for other in self._all if other is not scheduler)
            if self._current is scheduler:
                self._current = None

    def submit(self, request: Request) -> None:
        """Hand a request to the current scheduler."""
        with self._lock:
            if self._current is not None:
                self._current.submit(request)
                return
        refuse(
            request, RequestError(503, "this node is loading: ask again in a moment", retry_after_ms=_RETRY_AFTER_MS)
        )

    def cancel(self, user: str, request_id: str) -> bool:
        """End a request, whoever has it. False if nobody has."""
        # Not `any`: an id may have been used again, and the older query is to end as well.
        return True in [scheduler.cancel(user, request_id) for scheduler in self._all]

    def partial(self, user: str, utterance: str, seq: int, text: str, session: str | None) -> bool:
        """A transcript that is still growing, for the current scheduler."""
        current = self._current
        return current is not None and current.partial(user, utterance, seq, text, session)

    def forget(self, erasure: Erasure) -> None:
        """Drop what some users have said, everywhere."""
        for scheduler in self._all:
            scheduler.forget(erasure)

    @property
    def load(self) -> dict[str, int]:
        """Sums over all schedulers."""
        loads = [scheduler.load for scheduler in self._all]
        return {name: sum(load[name] for load in loads) for name in ("queued", "active", "sessions")}

    @property
    def heartbeats(self) -> dict[str, Heartbeat]:
        """Of every engine thread; the first that was started is ``engine``."""
        return {f"engine{number or ''}": scheduler.heartbeat for number, scheduler in enumerate(self._all)}

    def drain(self, timeout_s: float, hurry: threading.Event | None = None) -> bool:
        """Drain every scheduler; they share the time. True if all that was accepted was answered."""
        give_up_at = time.monotonic() + timeout_s
        drained = [scheduler.drain(max(0.0, give_up_at - time.monotonic()), hurry) for scheduler in self._all]
        return all(drained)
