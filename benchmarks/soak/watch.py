"""What the soak sees of the daemon from outside: its process, and what it publishes to the host."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks.process import memory
from benchmarks.serving import ServingError
from benchmarks.soak.acts import BASE
from benchmarks.soak.broker import HOST_USER, connect, make_client
from benchmarks.soak.records import Sample

if TYPE_CHECKING:
    from paho.mqtt.client import MQTTMessage

    from benchmarks.serving import Daemon

_PROBE_S: Final = 0.5
_BUSY: Final = 429
_STATE_VALUES: Final = {"range_km": 312, "charge_percent": 64, "tyre_status": "all at 2.5 bar"}


class Host:
    """The host of the device: publishes values for answers, reads the metrics, and asks whether anybody answers.

    Attributes:
        metrics: the latest report of the daemon.
    """

    def __init__(self, port: int) -> None:
        self.metrics: dict[str, Any] = {}
        self._port = port
        self._probes = 0
        self._changed = threading.Condition()
        self._answered_at = 0.0
        self._metrics_at = 0.0
        topics = (f"{BASE}/metrics", f"{BASE}/reply/{HOST_USER}/default")
        self._client = make_client(HOST_USER, self._on_message, topics)
        connect(self._client, port)

    def close(self) -> None:
        """Disconnect."""
        self._client.disconnect()
        self._client.loop_stop()

    def publish_state(self) -> None:
        """Publish the values that answers use."""
        for name, value in _STATE_VALUES.items():
            self._client.publish(f"{BASE}/state/{name}", json.dumps(value), qos=1, retain=True)

    def wait_answered(self, daemon: Daemon, timeout_s: float) -> float:
        """Ask until a query is answered; returns when. A status may be an old one that the broker had kept.

        Raises:
            ServingError: the daemon ended, or nothing was answered in time.
        """
        asked_at = time.monotonic()
        deadline = asked_at + timeout_s
        with self._changed:
            while self._answered_at <= asked_at:
                if not daemon.running or time.monotonic() > deadline:
                    raise ServingError(f"the daemon does not answer: {daemon.last_words()}")
                if self._client.is_connected():
                    self._probes += 1
                    body = {"id": f"probe-{self._probes}", "text": "hello", "cache": "bypass", "max_tokens": 1}
                    self._client.publish(f"{BASE}/query/{HOST_USER}", json.dumps(body), qos=1)
                self._changed.wait(_PROBE_S)
            return self._answered_at

    def wait_metrics(self, timeout_s: float) -> dict[str, Any]:
        """The next report, or the last one if none comes in time."""
        asked_at = time.monotonic()
        with self._changed:
            self._changed.wait_for(lambda: self._metrics_at > asked_at, timeout_s)
            return self.metrics

    def _on_message(self, message: MQTTMessage) -> None:
        event: dict[str, Any] = json.loads(message.payload)
        with self._changed:
            if message.topic == f"{BASE}/metrics":
                self.metrics, self._metrics_at = event, message.timestamp
            # Busy is an answer; while it loads, it refuses.
            elif event["type"] == "final" or event.get("code") == _BUSY:
                self._answered_at = message.timestamp
            self._changed.notify_all()


def take_sample(pid: int, others_cpu: float, metrics: dict[str, Any]) -> Sample:
    """The daemon's process now. Raises ``OSError`` if it is gone."""
    taken = memory(pid)
    return Sample(
        at=time.monotonic(),
        rss_anon_mb=taken.rss_anon_mb,
        rss_file_mb=taken.rss_file_mb,
        descriptors=len(os.listdir(f"/proc/{pid}/fd")),
        threads=len(os.listdir(f"/proc/{pid}/task")),
        written_bytes=written_bytes(pid),
        # A broker that was killed meanwhile takes its own time with it.
        others_cpu=round(min(others_cpu, 1.0), 4),
        gauges=metrics.get("gauges", {}),
    )


def written_bytes(pid: int) -> int:
    """What a process has had written to disks so far (``write_bytes`` of proc_pid_io(5)). Raises ``OSError``."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("write_bytes")))


def counts_writes(folder: Path) -> bool:
    """Whether Linux counts what is written to a folder as written to a disk: not in memory (tmpfs)."""
    before = written_bytes(os.getpid())
    path = folder / ".write-test"
    with path.open("wb") as stream:
        stream.write(b"x" * 65_536)
        stream.flush()
        os.fsync(stream.fileno())
    path.unlink()
    return written_bytes(os.getpid()) > before
