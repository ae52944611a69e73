"""More queries at once than can be answered: every one gets its one terminal event, soon, within the memory.

Scaled down; ``EDGE_LLM_TEST_FLOOD=200x50`` is the full size.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter

import pytest

from edge_llm.bundle.manifest import Bundle
from edge_llm.config import CacheConfig, Config
from edge_llm.unit_files import memory_limit_bytes
from tests.brokers import Mosquitto
from tests.paths import TINY_BUNDLE

pytestmark = [pytest.mark.broker, pytest.mark.slow, pytest.mark.timeout(600)]
PROCESSES = 4
BUSY_P99_MS = 50.0
MAX_QUEUED = 64


class Loads:
    def __init__(self, port: int, clients: int, queries: int) -> None:
        each = clients // PROCESSES
        command = [sys.executable, "-m", "tests.faults.load", str(port)]
        self._processes = [
            subprocess.Popen(
                [*command, str(number * each), str(each), str(queries)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for number in range(PROCESSES)
        ]

    def __enter__(self) -> Loads:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()

    def read(self) -> list[str]:
        """A line of each."""
        return [process.stdout.readline().strip() for process in self._processes]

    def tell(self) -> None:
        for process in self._processes:
            process.stdin.write("\n")
            process.stdin.flush()


def test_a_flood_is_answered_query_by_query(tmp_path, start_faulty, listen):
    clients, queries = map(int, os.environ.get("EDGE_LLM_TEST_FLOOD", "20x20").split("x"))
    broker = Mosquitto(tmp_path, "max_queued_messages 100000")  # the default drops what is over 1000
    with broker, Loads(broker.port, clients, queries) as loads:
        daemon = start_faulty(broker.port, f"serving.max_queued={MAX_QUEUED}", "serving.max_queued_per_user=2")
        witness = listen(broker.port, "edge_llm/v1/edge/+", "edge_llm/v1/edge/reply/barrier/#")
        witness.wait_status("online")
        assert loads.read() == ["ready"] * PROCESSES
        began_at = time.monotonic()
        loads.tell()
        assert loads.read() == ["answered"] * PROCESSES
        took_s = time.monotonic() - began_at
        # What the daemon sent before this answer has been delivered before it.
        witness.answer(user="barrier")
        peak_bytes = int(_status(daemon.pid, "VmHWM")) * 1024
        rss_bytes = int(_status(daemon.pid, "VmRSS")) * 1024
        report = witness.metrics()
        loads.tell()
        counts = [json.loads(line) for line in loads.read()]
    codes: Counter[str] = sum((Counter(count["codes"]) for count in counts), Counter())
    rows = [line.split() for line in (daemon.faults / "busy_ms").read_text().splitlines()]
    decided_ms, sent_ms = (sorted(map(float, column)) for column in zip(*rows, strict=True))
    limit_bytes = memory_limit_bytes(Bundle.open(TINY_BUNDLE), Config(cache=CacheConfig()))
    gauges = [event["gauges"] for _, topic, event in witness._heard if topic.endswith("/metrics")]
    gauges = [gauge for gauge in gauges if "queued" in gauge]  # those before the model was loaded have none
    queued, waiting = (max(gauge[name] for gauge in gauges) for name in ("queued", "outgoing_waiting"))
    figures = {
        "clients x queries": f"{clients} x {queries}",
        "took_s": round(took_s, 1),
        "codes": dict(codes),
        "429 decided ms p50, p99, max": _percentiles(decided_ms),
        "429 sent ms p50, p99, max": _percentiles(sent_ms),
        "rss, peak, limit MB": [value >> 20 for value in (rss_bytes, peak_bytes, limit_bytes)],
        "most queued": queued,
        "most waiting to be sent": waiting,
        "latency": report["latency"],
    }
    print(json.dumps(figures))
    assert [(count["missing"], count["twice"]) for count in counts] == [(0, 0)] * PROCESSES
    assert sum(codes.values()) == clients * queries
    assert set(codes) <= {"0", "429"}
    assert codes["429"] == len(rows) > 0
    assert queued <= MAX_QUEUED
    assert peak_bytes < limit_bytes
    # How soon it leaves is the broker's to say: it takes 20 unacknowledged messages, and reads one packet of a client
    # a round, however many the others have for it.
    assert _percentiles(decided_ms)[1] < BUSY_P99_MS


def _percentiles(values: list[float]) -> list[float]:
    return [values[len(values) // 2], values[len(values) * 99 // 100], values[-1]]


def _status(pid: int, name: str) -> str:
    with open(f"/proc/{pid}/status") as stream:
        return next(line.split()[1] for line in stream if line.startswith(f"{name}:"))
