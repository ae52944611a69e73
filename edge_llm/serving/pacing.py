"""How much prefetch computes: so little at once that a query need not wait, and so little on average as is allowed."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge_llm.config import PrefetchConfig
    from edge_llm.device.power import PowerMonitor

_SMALLEST_CHUNK: Final = 4
_FIRST_CHUNK: Final = 16
# Aims below the bound, so that a slow moment does not pass it.
_AIM: Final = 0.8
_GROWTH: Final = 2
# A whole utterance may come at once.
_BURST_S: Final = 5.0
_POWER_RETRY_S: Final = 5.0


class ChunkPacer:
    """The size of a prefill chunk that takes at most ``max_ms``, learnt from those that have run.

    Args:
        largest: never more tokens than this.
        max_ms: a query that comes meanwhile waits so long at worst.
    """

    def __init__(self, largest: int, max_ms: float) -> None:
        self._largest = largest
        self._aim_ms = max_ms * _AIM
        self.tokens = min(largest, _FIRST_CHUNK)

    def observe(self, tokens: int, elapsed_ms: float) -> None:
        """Learn from a chunk of ``tokens`` that took ``elapsed_ms``."""
        if elapsed_ms > self._aim_ms and tokens > _SMALLEST_CHUNK:
            # In proportion: what a chunk costs apart from its tokens is the smaller part.
            self.tokens = max(_SMALLEST_CHUNK, min(self.tokens, int(tokens * self._aim_ms / elapsed_ms)))
        elif tokens >= self.tokens and elapsed_ms < self._aim_ms * 0.9:
            self.tokens = min(self._largest, self.tokens + _GROWTH)


class TokenBudget:
    """At most ``tokens_per_s`` on average, with bursts. A chunk may overdraw it, and is paid back before the next.

    Args:
        tokens_per_s: the average.
        clock: in seconds.
    """

    def __init__(self, tokens_per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = tokens_per_s
        self._most = max(1.0, tokens_per_s * _BURST_S)
        self._clock = clock
        self._balance = self._most
        self._updated_at = clock()

    def ready_in_s(self) -> float:
        """Seconds until something may be computed; 0 is now."""
        self._refill()
        # A whole token, so that a rounding error is not waited for again and again.
        return max(0.0, (1.0 - self._balance) / self._rate)

    def spend(self, tokens: int) -> None:
        """Account for tokens that have been computed."""
        self._refill()
        self._balance -= tokens

    def _refill(self) -> None:
        now = self._clock()
        self._balance = min(self._most, self._balance + (now - self._updated_at) * self._rate)
        self._updated_at = now


class Pace:
    """Whether prefetch may compute now, and how much at once.

    Args:
        largest: of a chunk, in tokens.
        config: the bounds.
        power: forbids it on battery or in heat.
        clock: in seconds.

    Attributes:
        computed_at: when something was computed last.
    """

    def __init__(self, largest: int, config: PrefetchConfig, power: PowerMonitor, clock: Callable[[], float]) -> None:
        self._pacer = ChunkPacer(largest, config.max_pause_ms)
        self._budget = TokenBudget(config.max_tokens_per_s, clock)
        self._power = power
        self._clock = clock
        self._suspended_until = 0.0
        self.computed_at = 0.0

    @property
    def chunk_tokens(self) -> int:
        """The most tokens to prefill at once."""
        return self._pacer.tokens

    def blocked_s(self) -> float:
        """Seconds until something may be computed; 0 or less is now."""
        if not self._power.allows_prefetch():
            return _POWER_RETRY_S
        return max(self._budget.ready_in_s(), self._suspended_until - self._clock())

    def suspend(self, seconds: float) -> None:
        """Compute nothing for a while."""
        self._suspended_until = self._clock() + seconds

    def account(self, computed: int, started: float) -> None:
        """So many tokens have been computed since ``started`` (``time.perf_counter()`` seconds)."""
        if not computed:
            return
        self.computed_at = self._clock()
        self._budget.spend(computed)
        if computed > 1:  # a decode step tells nothing of chunks
            self._pacer.observe(computed, (time.perf_counter() - started) * 1e3)
