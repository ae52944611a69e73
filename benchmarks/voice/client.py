"""A daemon in one of the modes, and a client that speaks to it word by word."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks.process import cpu_seconds, machine_busy_seconds
from benchmarks.serving import NODE, Answer, BenchClient, Daemon, ServingError
from edge_llm.local_broker import local_broker

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from paho.mqtt.client import Client, MQTTMessage

    from benchmarks.voice.trace import Utterance
    from edge_llm.bundle.manifest import Bundle

_BASE: Final = f"edge_llm/v1/{NODE}"
_SUBSCRIBE_TIMEOUT_S: Final = 10.0
# The pause before a query where the words are not heard: time for what a daemon does between two queries.
UNHEARD_S: Final = 0.5
METRICS_INTERVAL_S: Final = 2.0
_TICK_S: Final = 0.02


@dataclass(frozen=True)
class Sample:
    """One query that has been answered.

    Attributes:
        first_ms: from the end of speech to the first text.
        source, cached_from, cached_tokens, prompt_tokens, completion_tokens: as in the final event; ``source`` is None
            for a peer, which has no such thing.
        decode_ms: a decode step of this answer, if it had any.
    """

    first_ms: float
    asked_before: bool
    source: str | None
    cached_from: str | None
    cached_tokens: int
    prompt_tokens: int
    completion_tokens: int
    decode_ms: float | None


class VoiceDaemon(Daemon):
    """``edge-llm serve`` with settings of its own."""

    def __init__(self, bundle: Bundle, cache_dir: Path, port: int, log_path: Path, settings: Mapping[str, Any]) -> None:
        super().__init__(bundle, cache_dir, port, log_path)
        for key, value in settings.items():
            # A JSON value is a TOML value too.
            self._command += ["--set", f"{key}={json.dumps(value)}"]


class VoiceClient(BenchClient):
    """Speaks as any user, and keeps what the daemon says about itself.

    Attributes:
        metrics: the latest metrics.
        max_cache_bytes: the most that the gauge ``prefix_cache_bytes`` has shown; None if there is no such gauge.
    """

    def __init__(self, port: int) -> None:
        self.metrics: dict[str, Any] = {}
        self.max_cache_bytes: int | None = None
        self._metrics_at = 0.0
        super().__init__(port)
        # QoS 1 for the replies, so that deltas and finals come with the QoS that they were published with.
        self._client.subscribe([(f"{_BASE}/reply/+/default", 1), (f"{_BASE}/metrics", 0)])
        try:
            self._subscribed.get(timeout=_SUBSCRIBE_TIMEOUT_S)
        except queue.Empty:
            raise ServingError("the broker did not accept the subscriptions") from None

    def publish_partial(self, user: str, utterance: str, seq: int, text: str) -> None:
        """A transcript that is still growing."""
        payload = json.dumps({"utterance": utterance, "seq": seq, "text": text})
        self._client.publish(f"{_BASE}/partial/{user}", payload, qos=0)

    def ask_as(self, daemon: Daemon, user: str, query: dict[str, Any]) -> Answer:
        """``ask`` one query as any user."""
        return self.ask(daemon, [query], user=user)[0]

    def next_metrics(self, daemon: Daemon) -> dict[str, Any]:
        """The next metrics that come. Raises ``ServingError`` if none do."""
        asked_at = time.monotonic()
        while self._metrics_at <= asked_at:
            if not daemon.running or time.monotonic() > asked_at + 5 * METRICS_INTERVAL_S + 5:
                raise ServingError(f"the daemon publishes no metrics: {daemon.last_words()}")
            time.sleep(_TICK_S)
        return self.metrics

    def _on_message(self, client: Client, userdata: object, message: MQTTMessage) -> None:
        if not message.topic.endswith("/metrics"):
            super()._on_message(client, userdata, message)
            return
        self.metrics = json.loads(message.payload)
        held = self.metrics.get("gauges", {}).get("prefix_cache_bytes")
        if held is not None:
            self.max_cache_bytes = max(int(held), self.max_cache_bytes or 0)
        self._metrics_at = time.monotonic()


class OthersShare:
    """The share of the machine's busy time that others take from now on: not this process, and none of its children."""

    def __init__(self) -> None:
        self._own, self._machine = _own_cpu_seconds(), machine_busy_seconds()

    def share(self) -> float:
        """So far. Children that have ended since do not count as our own."""
        own, machine = _own_cpu_seconds() - self._own, machine_busy_seconds() - self._machine
        return max(0.0, machine - own) / max(machine, 1e-9)


@contextlib.contextmanager
def serving(
    bundle: Bundle, prepared_dir: Path, settings: Mapping[str, Any]
) -> Iterator[tuple[VoiceDaemon, VoiceClient, str]]:
    """A broker, a daemon that remembers nothing but its prepared copy, and a client; all are stopped at the end.

    Yields:
        The daemon, online; the client; the broker's name.

    Raises:
        ServingError: the daemon does not come online.
    """
    with (
        tempfile.TemporaryDirectory(prefix=".voice-", dir=prepared_dir) as name,
        local_broker(Path(name)) as broker,
    ):
        state_dir = Path(name) / "cache"
        state_dir.mkdir()
        (prepared_dir / "prepared").mkdir(exist_ok=True)
        (state_dir / "prepared").symlink_to((prepared_dir / "prepared").resolve())
        client = VoiceClient(broker.port)
        daemon = VoiceDaemon(bundle, state_dir, broker.port, Path(name) / "daemon.log", settings)
        try:
            client.wait_online(daemon, daemon.start())
            yield daemon, client, broker.name
        finally:
            daemon.stop()
            client.close()


def replay(client: VoiceClient, daemon: Daemon, utterance: Utterance, speed: float, *, listened: bool) -> Sample:
    """Say an utterance word by word, in real time if ``speed`` is 1, and wait until it has been answered.

    Where nobody listens to the words, a short pause stands for them.
    """
    if not listened:
        time.sleep(UNHEARD_S / speed)
        return _ask(client, daemon, utterance)
    began = time.monotonic()
    for seq, partial in enumerate(utterance.partials):
        wait_until(began + partial.at_s / speed)
        client.publish_partial(utterance.user, utterance.id, seq, partial.text)
    wait_until(began + utterance.duration_s / speed)
    return _ask(client, daemon, utterance)


def _ask(client: VoiceClient, daemon: Daemon, utterance: Utterance) -> Sample:
    query = {"id": utterance.id, "utterance": utterance.id, "text": utterance.text}
    return to_sample(client.ask_as(daemon, utterance.user, query), asked_before=utterance.asked_before)


def to_sample(answer: Answer, *, asked_before: bool) -> Sample:
    """What is kept of an answer."""
    assert answer.final is not None
    final = answer.final.payload
    usage, timing = final["usage"], final["timing"]
    first_at = min([event.at for event in answer.deltas[:1]] + [answer.final.at])
    steps = usage["completion_tokens"] - 1
    # An answer that was known before has nothing to say about steps.
    stepped = final["source"] == "model" and steps > 0 and timing["ttft_ms"] is not None
    return Sample(
        first_ms=(first_at - answer.published_at) * 1e3,
        asked_before=asked_before,
        source=final["source"],
        cached_from=usage["cached_from"],
        cached_tokens=usage["cached_tokens"],
        prompt_tokens=usage["prompt_tokens"],
        completion_tokens=usage["completion_tokens"],
        decode_ms=(timing["total_ms"] - timing["ttft_ms"]) / steps if stepped else None,
    )


def wait_until(moment: float) -> None:
    """Sleep until ``time.monotonic()`` is there."""
    if (remaining_s := moment - time.monotonic()) > 0:
        time.sleep(remaining_s)


def _own_cpu_seconds() -> float:
    pids = {os.getpid()}
    for children in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            pids.update(map(int, children.read_text().split()))
    total = 0.0
    for pid in pids:
        with contextlib.suppress(OSError):
            total += cpu_seconds(pid)
    return total
