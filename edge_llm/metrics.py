"""Counters and latencies of the daemon, as published on the metrics topic."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

RESERVOIR_SIZE: Final = 1024
_PERCENTILES: Final = (50, 95, 99)


class Metrics:
    """Thread-safe counters, gauges and bounded latency reservoirs.

    A reservoir keeps the latest ``RESERVOIR_SIZE`` values, so percentiles speak of recent queries, not of all since
    the start.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters: dict[str, int] = {}
        self._reservoirs: dict[str, deque[float]] = {}
        self._gauges: dict[str, Callable[[], float | None]] = {}
        self._started_at = time.monotonic()

    def count(self, name: str, by: int = 1) -> None:
        """Add to a counter."""
        with self._lock:
            self._counters[name] = self._counters.get(name, 0) + by

    def counter(self, name: str) -> int:
        """A counter's value."""
        with self._lock:
            return self._counters.get(name, 0)

    def observe(self, name: str, value_ms: float) -> None:
        """Add a duration in milliseconds to a reservoir."""
        with self._lock:
            reservoir = self._reservoirs.get(name)
            if reservoir is None:
                reservoir = self._reservoirs[name] = deque(maxlen=RESERVOIR_SIZE)
            reservoir.append(value_ms)

    def gauge(self, name: str, read: Callable[[], float | None]) -> None:
        """Have ``read()`` called for every snapshot, None if it is unknown. It must be quick and thread-safe."""
        with self._lock:
            self._gauges[name] = read

    def snapshot(self) -> dict[str, Any]:
        """``{"uptime_s", "counters": {name: n}, "gauges": {name: x}, "latency": {name: {count, p50, p95, p99}}}``.

        Latencies are in milliseconds; ``count`` is the number of values that the percentiles are taken from.
        """
        with self._lock:
            counters = dict(sorted(self._counters.items()))
            reservoirs = {name: list(values) for name, values in sorted(self._reservoirs.items())}
            gauges = dict(sorted(self._gauges.items()))
        # Gauges are read without the lock: one may count something itself.
        return {
            "uptime_s": round(time.monotonic() - self._started_at, 3),
            "counters": counters,
            "gauges": {name: read() for name, read in gauges.items()},
            "latency": {name: _summary(values) for name, values in reservoirs.items()},
        }


def _summary(values: list[float]) -> dict[str, float]:
    values.sort()
    # Nearest rank: the smallest value that at least p % of all do not exceed.
    ranks = {f"p{p}": values[max(0, -(-len(values) * p // 100) - 1)] for p in _PERCENTILES}
    return {"count": len(values), **{name: round(value, 3) for name, value in ranks.items()}}
