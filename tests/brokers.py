"""Real brokers for tests, and waiting for what gives no event of its own."""

from __future__ import annotations

import time
from collections.abc import Callable

from edge_llm.local_broker import IotCore, LocalBroker, Mosquitto, free_port

__all__ = ["IotCore", "LocalBroker", "Mosquitto", "free_port", "wait_for"]


def wait_for(condition: Callable[[], bool], timeout_s: float, otherwise: Callable[[], str] = lambda: "") -> None:
    """Poll another process. Raises ``TimeoutError``."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(otherwise() or f"not within {timeout_s} s")
        time.sleep(0.01)
