"""A thread that reads sensors: a file of the kernel may not answer, as when a rail's I2C bus hangs."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Final, TypeAlias, TypeVar

_log = logging.getLogger(__name__)

Work: TypeAlias = Callable[[], None]
Post: TypeAlias = Callable[[Work], None]
_Value = TypeVar("_Value")
# Some machines take milliseconds for a sensor, none takes this.
_STALLED_S: Final = 2.0


def run_now(work: Work) -> None:
    """For who may wait: on this thread."""
    work()


class SensorThread:
    """Does what is posted, one after the other. While one of them hangs, what else is posted is left out.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._work: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._busy_since: float | None = None
        self._complained = False
        # A daemon, since nothing ends a read that hangs.
        threading.Thread(target=self._run, name="sensors", daemon=True).start()

    def post(self, work: Work) -> None:
        """Have it done soon, or never. Returns at once."""
        since = self._busy_since
        if since is None or self._clock() - since <= _STALLED_S:
            self._work.put(work)
        elif not self._complained:
            self._complained = True
            _log.warning("a sensor does not answer: temperature, supply and energy stay as they were")

    def ask(self, read: Callable[[], _Value], timeout_s: float) -> _Value | None:
        """The value, or None if it does not come in time or cannot be read."""
        answers: queue.SimpleQueue[_Value] = queue.SimpleQueue()
        self.post(lambda: answers.put(read()))
        try:
            return answers.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def close(self) -> None:
        """End the thread when it has done what it does; nothing waits for it."""
        self._work.put(None)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            self._busy_since = self._clock()
            try:
                work()
            except Exception:  # the next reading may do better
                _log.exception("a sensor could not be read")
            self._busy_since = None
            if self._complained:
                self._complained = False
                _log.info("the sensors answer again")
