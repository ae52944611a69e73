"""What serving adds to the engine: ``python -m benchmarks.daemon [--json] [--bundle DIR]`` (docs/benchmarks.md).

A broker and ``edge-llm serve`` run as processes of their own on 127.0.0.1; one client asks.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np

from benchmarks.files.bundles import TARGET, gpt2_bundle
from benchmarks.files.cache import default_cache_dir
from benchmarks.machine import describe_machine, format_machine
from benchmarks.process import Memory, cpu_seconds, memory
from benchmarks.ratios import median, percentile
from benchmarks.serving import Answer, BenchClient, Daemon, ServingError
from edge_llm.bundle.manifest import TOKENIZER_FILE, Bundle
from edge_llm.bundle.prepare import prepared_graph
from edge_llm.device.cpu import physical_cores
from edge_llm.engine.prompt import Message, PromptRenderer
from edge_llm.engine.tokenizer import Tokenizer
from edge_llm.local_broker import local_broker

if TYPE_CHECKING:
    from collections.abc import Sequence

PACKAGES: Final = ("onnxruntime", "paho-mqtt", "msgspec", "tokenizers", "numpy")
# Decode a while, so that an answer's first words compete with its next steps for the processor.
_ANSWER_TOKENS: Final = 16
_PAUSE_S: Final = 0.05
_REST_S: Final = 2.0
_FILL_ATTEMPTS: Final = 5
_WORDS: Final = (
    "range",
    "battery",
    "window",
    "heating",
    "route",
    "station",
    "charge",
    "music",
    "light",
    "seat",
    "rain",
)


class Limit(msgspec.Struct, frozen=True, kw_only=True):
    """A figure that must not be exceeded."""

    name: str
    at_most: float
    value: float
    reached: bool


class DaemonReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured; megabytes are decimal, ``docs/benchmarks.md`` defines each figure.

    ``mqtt_overhead_ms`` is publish to first delta at the client minus ``prefill_ms``; ``wire_ms`` the part of it
    outside of the daemon, ``queue_ms`` the part before the daemon began the query. Memory is taken at rest, after every
    slot has been full; ``busy`` is the moment of the last answer, with the buffers of its prefills.
    """

    machine: dict[str, Any]
    bundle: str
    slots: int
    context: int
    broker: str
    queries: int
    mqtt_overhead_ms_p50: float
    mqtt_overhead_ms_p99: float
    wire_ms_p50: float
    queue_ms_p50: float
    prefill_ms_p50: float
    start_to_online_s: float
    starts_s: list[float]
    idle_cpu_percent: float
    rss_anon_without_kv_mb: float
    rss_anon_busy_without_kv_mb: float
    rss_anon_mb: float
    kv_mb: float
    rss_file_mb: float
    limits: list[Limit]


LIMITS: Final = {
    "mqtt_overhead_ms_p50": 3.0,
    "start_to_online_s": 1.5,
    "idle_cpu_percent": 1.0,
    "rss_anon_without_kv_mb": 60.0,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; exit status 1 if a limit was exceeded, 2 if it could not be measured."""
    options = _parser().parse_args(arguments)
    machine = describe_machine(physical_cores(), PACKAGES)
    path = options.bundle or gpt2_bundle(options.cache_dir)
    prepared_dir = options.cache_dir if options.bundle else path.parent
    bundle = Bundle.open(path)
    prepared_graph(bundle, TARGET, prepared_dir)
    try:
        report = measure(bundle, prepared_dir, machine, options)
    except ServingError as error:
        print(f"benchmarks.daemon: {error}", file=sys.stderr)
        return 2
    print(json.dumps(msgspec.to_builtins(report)) if options.json else format_report(report))
    return 0 if all(limit.reached for limit in report.limits) else 1


def measure(bundle: Bundle, cache_dir: Path, machine: dict[str, Any], options: argparse.Namespace) -> DaemonReport:
    """Start, idle, ask, fill the cache; in that order, so that idling is measured before anything else ran.

    Raises:
        ServingError: the daemon or the broker did not do what the measurement needs.
    """
    with tempfile.TemporaryDirectory() as name, local_broker(Path(name)) as broker:
        client = BenchClient(broker.port)
        daemon = Daemon(bundle, cache_dir, broker.port, Path(name) / "daemon.log")
        try:
            starts_s = [_start(daemon, client) for _ in range(options.starts)]
            slots = client.info["limits"]["slots"]
            idle_cpu_percent = _idle_cpu_percent(daemon, options.idle_s)
            answers = _ask_one_by_one(daemon, client, options.queries)
            kv_bytes = _fill_slots(daemon, client, bundle, slots)
            busy = memory(daemon.pid)
            time.sleep(_REST_S)
            resting = memory(daemon.pid)
        finally:
            daemon.stop()
            client.close()
        broker_name = broker.name
    return make_report(
        machine=machine,
        bundle=bundle,
        slots=slots,
        broker=broker_name,
        starts_s=starts_s,
        idle_cpu_percent=idle_cpu_percent,
        answers=answers,
        busy=busy,
        resting=resting,
        kv_bytes=kv_bytes,
    )


def make_report(  # noqa: PLR0913 - one argument a measurement
    *,
    machine: dict[str, Any],
    bundle: Bundle,
    slots: int,
    broker: str,
    starts_s: Sequence[float],
    idle_cpu_percent: float,
    answers: Sequence[Answer],
    busy: Memory,
    resting: Memory,
    kv_bytes: int,
) -> DaemonReport:
    """Figures and limits from the measurements."""
    overhead, wire, queued, prefill = zip(*(split_overhead(answer) for answer in answers), strict=True)
    kv_mb = kv_bytes / 1e6
    figures = {
        "mqtt_overhead_ms_p50": round(median(overhead), 3),
        "start_to_online_s": round(median(starts_s), 3),
        "idle_cpu_percent": round(idle_cpu_percent, 2),
        "rss_anon_without_kv_mb": round(resting.rss_anon_mb - kv_mb, 1),
    }
    return DaemonReport(
        machine=machine,
        bundle=f"{bundle.manifest.name} {bundle.manifest.version}",
        slots=slots,
        context=bundle.manifest.model.max_seq_len,
        broker=broker,
        queries=len(answers),
        mqtt_overhead_ms_p99=round(percentile(overhead, 99), 3),
        wire_ms_p50=round(median(wire), 3),
        queue_ms_p50=round(median(queued), 3),
        prefill_ms_p50=round(median(prefill), 3),
        starts_s=[round(start, 3) for start in starts_s],
        rss_anon_mb=resting.rss_anon_mb,
        rss_anon_busy_without_kv_mb=round(busy.rss_anon_mb - kv_mb, 1),
        kv_mb=round(kv_mb, 1),
        rss_file_mb=resting.rss_file_mb,
        limits=[
            Limit(name=name, at_most=at_most, value=figures[name], reached=figures[name] <= at_most)
            for name, at_most in LIMITS.items()
        ],
        **figures,
    )


def split_overhead(answer: Answer) -> tuple[float, float, float, float]:
    """(overhead, wire, queue, prefill) of one answer in milliseconds.

    The daemon's clock starts when it reads the query; ``prefill_ms`` ends with the first token. What is left of the
    time from publish to first delta is the overhead: the way there and back, the queue, and making text of the token.

    Raises:
        ServingError: it had no text.
    """
    if answer.final is None or not answer.deltas:
        raise ServingError("an answer came without any text")
    timing = answer.final.payload["timing"]
    first_ms = (answer.deltas[0].at - answer.published_at) * 1e3
    return first_ms - timing["prefill_ms"], first_ms - timing["ttft_ms"], timing["queue_ms"], timing["prefill_ms"]


def _start(daemon: Daemon, client: BenchClient) -> float:
    """Restart the daemon; returns seconds from the start of its process to the status ``online``."""
    daemon.stop()
    started_at = daemon.start()
    return client.wait_online(daemon, started_at) - started_at


def _idle_cpu_percent(daemon: Daemon, seconds: float) -> float:
    """Processor time of a daemon that has nothing to do, in percent of one core."""
    time.sleep(1.0)  # what the start left over
    cpu, clock = cpu_seconds(daemon.pid), time.monotonic()
    time.sleep(seconds)
    return 100 * (cpu_seconds(daemon.pid) - cpu) / (time.monotonic() - clock)


def _ask_one_by_one(daemon: Daemon, client: BenchClient, count: int) -> list[Answer]:
    rng = random.Random(0)
    answers = []
    for number in range(-5, count):
        text = " ".join(rng.choices(_WORDS, k=12)) + "?"
        # The caches are bypassed: this measures what the way through the daemon costs, not what they save.
        query = {"id": f"ask-{number}", "text": text, "max_tokens": _ANSWER_TOKENS, "cache": "bypass"}
        answer = client.ask(daemon, [query])[0]
        if number >= 0:  # the first few are a warm-up
            answers.append(answer)
        time.sleep(_PAUSE_S)
    return answers


def _fill_slots(daemon: Daemon, client: BenchClient, bundle: Bundle, slots: int) -> int:
    """Fill every slot to the context's end at once; returns the bytes of the whole cache.

    Raises:
        ServingError: the model ended its answers early, again and again.
    """
    model = bundle.manifest.model
    answer_tokens = model.max_seq_len // 8
    renderer = PromptRenderer(bundle.manifest.prompt, Tokenizer.from_file(bundle.verified_path(TOKENIZER_FILE)))
    for attempt in range(_FILL_ATTEMPTS):
        queries = [
            _filling_query(f"fill-{attempt}-{slot}", renderer, model.max_seq_len, answer_tokens)
            for slot in range(slots)
        ]
        answers = client.ask(daemon, queries)
        if all(answer.final is not None and answer.final.payload["finish_reason"] == "length" for answer in answers):
            values = model.num_layers * 2 * slots * model.num_kv_heads * model.max_seq_len * model.head_dim
            return values * np.dtype(bundle.manifest.graph(TARGET).kv_dtype).itemsize
    raise ServingError("the model's answers end too early to fill the context")


def _filling_query(query_id: str, renderer: PromptRenderer, context: int, answer_tokens: int) -> dict[str, Any]:
    """A query whose prompt and answer take the whole context."""
    rng = random.Random(query_id)
    words = rng.choices(_WORDS, k=context)
    low, high = 1, context
    while low < high:
        middle = (low + high + 1) // 2
        if len(renderer.encode([Message("user", " ".join(words[:middle]))])) <= context - answer_tokens:
            low = middle
        else:
            high = middle - 1
    text = " ".join(words[:low])
    max_tokens = context - len(renderer.encode([Message("user", text)]))
    return {"id": query_id, "text": text, "max_tokens": max_tokens, "temperature": 0, "cache": "bypass"}


def format_report(report: DaemonReport) -> str:
    """The report as lines for people."""
    starts = ", ".join(f"{start:.2f}" for start in report.starts_s)
    spread = statistics.pstdev(report.starts_s)
    lines = [
        format_machine(report.machine),
        f"{report.bundle}, {report.slots} slots of {report.context} positions, {report.broker} on 127.0.0.1, MQTT 5",
        "",
        f"process start to online   {report.start_to_online_s:8.2f} s     of {starts} (±{spread:.2f})",
        f"idle processor            {report.idle_cpu_percent:8.2f} %     of one core",
        f"overhead p50              {report.mqtt_overhead_ms_p50:8.2f} ms    publish to first delta, minus prefill "
        f"({report.prefill_ms_p50:.1f} ms), {report.queries} queries",
        f"  on the wire             {report.wire_ms_p50:8.2f} ms",
        f"  in the queue            {report.queue_ms_p50:8.2f} ms",
        f"overhead p99              {report.mqtt_overhead_ms_p99:8.2f} ms",
        f"anonymous memory          {report.rss_anon_mb:8.1f} MB    after every slot was full",
        f"  without the KV cache    {report.rss_anon_without_kv_mb:8.1f} MB    "
        f"({report.rss_anon_busy_without_kv_mb:.1f} MB at the last answer)",
        f"  KV cache                {report.kv_mb:8.1f} MB",
        f"file-backed memory        {report.rss_file_mb:8.1f} MB",
        "",
    ]
    for limit in report.limits:
        verdict = "reached" if limit.reached else "MISSED"
        lines.append(f"{verdict:8} {limit.name} {limit.value:g}, at most {limit.at_most:g}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.daemon", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.add_argument("--bundle", type=Path, help="a bundle folder (default: GPT-2 124M's shape, random weights)")
    parser.add_argument("--starts", type=int, default=5, help="how often it is started (default 5)")
    parser.add_argument("--queries", type=int, default=200, help="how many are asked (default 200)")
    parser.add_argument("--idle-s", type=float, default=15.0, help="how long it idles (default 15)")
    parser.add_argument("--cache-dir", type=Path, default=default_cache_dir(), help="where models are kept")
    return parser


if __name__ == "__main__":
    sys.exit(main())
