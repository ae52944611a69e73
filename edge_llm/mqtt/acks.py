"""Which messages from the broker may be acknowledged, and when.

MQTT wants PUBACKs in the order in which the messages came ([MQTT-4.6.0-2]), while queries finish in any order; and a
packet id means nothing on another connection, where the broker may use it for another message.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


@dataclass(eq=False)
class Delivery:
    """One message that the broker waits to see acknowledged."""

    connection: int
    mid: int
    done: bool = False


class AckQueue:
    """The deliveries of one connection after another, in order of receipt. Used by the link's thread only."""

    def __init__(self) -> None:
        self._connection = 0
        self._unacknowledged: deque[Delivery] = deque()

    def __len__(self) -> int:
        return len(self._unacknowledged)

    def new_connection(self) -> None:
        """Forget what came before: the broker will deliver it again."""
        self._connection += 1
        self._unacknowledged.clear()

    def receive(self, mid: int) -> Delivery:
        """Note a message that must be acknowledged in its turn."""
        delivery = Delivery(self._connection, mid)
        self._unacknowledged.append(delivery)
        return delivery

    def finish(self, delivery: Delivery) -> list[int]:
        """Mark a delivery as dealt with; returns the packet ids to acknowledge now, in order, maybe none."""
        delivery.done = True
        mids: list[int] = []
        if delivery.connection == self._connection:
            while self._unacknowledged and self._unacknowledged[0].done:
                mids.append(self._unacknowledged.popleft().mid)
        return mids
