"""The waiting line: bounded, interactive before background, and a fair share for every user."""

from __future__ import annotations

from collections import Counter, deque
from typing import TYPE_CHECKING

from edge_llm.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from edge_llm.serving.request import Request

# A guess at when a place frees up: one short answer.
_RETRY_AFTER_MS = 500


class FairQueue:
    """Requests that wait for a slot. Not thread-safe.

    Within a priority, the user with the fewest running requests comes first, then the one who waited longest since
    they were last served; a user's own requests keep their order.

    Args:
        max_queued: bound on all waiting requests.
        max_queued_per_user: bound on one user's.
    """

    def __init__(self, max_queued: int, max_queued_per_user: int) -> None:
        self._max_queued = max_queued
        self._max_queued_per_user = max_queued_per_user
        self._lines: dict[str, dict[str, deque[Request]]] = {"interactive": {}, "background": {}}

    def __len__(self) -> int:
        return sum(len(line) for lines in self._lines.values() for line in lines.values())

    def __iter__(self) -> Iterator[Request]:
        for lines in self._lines.values():
            for line in lines.values():
                yield from line

    def push(self, request: Request) -> None:
        """Append a request. Raises ``RequestError`` 429 when the queue or the user's share of it is full."""
        if len(self) >= self._max_queued:
            raise RequestError(
                429, f"the queue of {self._max_queued} is full: try again later", retry_after_ms=_RETRY_AFTER_MS
            )
        waiting = sum(len(lines.get(request.user, ())) for lines in self._lines.values())
        if waiting >= self._max_queued_per_user:
            raise RequestError(
                429,
                f"{waiting} queries of user {request.user} are waiting already: wait for an answer first",
                retry_after_ms=_RETRY_AFTER_MS,
            )
        self._lines[request.priority].setdefault(request.user, deque()).append(request)

    def pop(self, running: Counter[str], eligible: Callable[[Request], bool]) -> Request | None:
        """Take the next request that is ``eligible``, or None. ``running`` counts each user's running requests."""
        for lines in self._lines.values():
            # dict order is the order of service: a served user goes to the end. sorted() is stable.
            for user in sorted(lines, key=lambda name: running[name]):
                request = next((candidate for candidate in lines[user] if eligible(candidate)), None)
                if request is not None:
                    self._take(request)
                    return request
        return None

    def remove_where(self, unwanted: Callable[[Request], bool]) -> list[Request]:
        """Take out every request for which ``unwanted`` holds; returns them."""
        removed = [request for request in self if unwanted(request)]
        for request in removed:
            self._lines[request.priority][request.user].remove(request)
        for lines in self._lines.values():
            for user in [name for name, line in lines.items() if not line]:
                del lines[user]
        return removed

    def _take(self, request: Request) -> None:
        lines = self._lines[request.priority]
        line = lines.pop(request.user)
        line.remove(request)
        if line:
            lines[request.user] = line
