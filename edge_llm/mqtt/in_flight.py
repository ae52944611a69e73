"""QoS 1 messages that the broker has not acknowledged yet, and those that it never will."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from edge_llm.mqtt.connection import Outgoing

# A message during which the broker has hung up this often, each time at once, is not offered again: some brokers end
# the connection instead of refusing a message, and it would come back with every new one.
MAX_HANG_UPS: Final = 4
AT_ONCE_S: Final = 2.0


class InFlight:
    """Messages by packet id, in the order of sending. Used by the link's thread only."""

    def __init__(self) -> None:
        self._messages: dict[int, Outgoing] = {}
        self._hang_ups: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._messages)

    def add(self, mid: int, message: Outgoing) -> None:
        """A message has been sent."""
        self._messages[mid] = message

    def take(self, mid: int) -> Outgoing | None:
        """The message of a packet id, which is no longer in flight; None if there is none."""
        self._hang_ups.pop(mid, None)
        return self._messages.pop(mid, None)

    def take_all(self) -> list[Outgoing]:
        """Every message, oldest first; none is in flight any more."""
        messages = list(self._messages.values())
        self._messages.clear()
        self._hang_ups.clear()
        return messages

    def after_connection(self, lasted_s: float) -> list[Outgoing]:
        """A connection has ended: returns the messages to give up, which are no longer in flight."""
        if lasted_s > AT_ONCE_S:
            self._hang_ups.clear()
            return []
        for mid in self._messages:
            self._hang_ups[mid] = self._hang_ups.get(mid, 0) + 1
        given_up = [mid for mid, count in self._hang_ups.items() if count >= MAX_HANG_UPS]
        return [message for mid in given_up if (message := self.take(mid)) is not None]
