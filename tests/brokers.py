"""Real brokers for tests, and waiting for what gives no event of its own."""

from __future__ import annotations

import time
from collections.abc import Callable

from edge_llm.local_broker import IotCore, LocalBroker, Mosquitto, free_port
from edge_llm.mqtt.asking import Asker

__all__ = ["IotCore", "LocalBroker", "Mosquitto", "free_port", "wait_for", "wait_offline"]


def wait_for(condition: Callable[[], bool], timeout_s: float, otherwise: Callable[[], str] = lambda: "") -> None:
    """Poll another process. Raises ``TimeoutError``."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(otherwise() or f"not within {timeout_s} s")
        time.sleep(0.01)


def wait_offline(asker: Asker, timeout_s: float) -> None:
    """Wait until a client has heard that a node is gone: before that, ``wait_online`` takes the old status for new."""
    wait_for(lambda: any(status.get("state") == "offline" for status in asker._statuses.values()), timeout_s)
