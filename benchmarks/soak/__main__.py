"""A daemon under mixed load for as long as you like: ``python -m benchmarks.soak --minutes N [--json]``.

A mosquitto with the files of examples/mosquitto, ``edge-llm serve`` with its default caches and the load (load.py) run
beside this one, on 127.0.0.1. Once in a while the broker is killed and started again. ``--out FILE`` keeps every
record as it comes, and ``--from FILE`` makes the report of such a file, also of a run that was killed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from benchmarks.files.cache import default_cache_dir
from benchmarks.machine import describe_machine
from benchmarks.ratios import percentile
from benchmarks.serving import Daemon, ServingError
from benchmarks.soak.acts import ODD_USER, PLAIN_KINDS
from benchmarks.soak.broker import DAEMON_USER, ExampleBroker, password_of
from benchmarks.soak.load import MAX_DRAIN_S
from benchmarks.soak.records import (
    DECODER,
    Again,
    Counts,
    Done,
    End,
    Record,
    RecordError,
    Restart,
    Sample,
    Start,
    read_records,
    to_line,
)
from benchmarks.soak.report import format_report, make_report
from benchmarks.soak.watch import Host, counts_writes, take_sample
from benchmarks.voice.client import OthersShare
from edge_llm.arguments import positive_int
from edge_llm.bundle.manifest import Bundle
from edge_llm.bundle.prepare import prepared_graph
from edge_llm.bundle.shipped import shipped_bundle
from edge_llm.device.cpu import physical_cores
from edge_llm.errors import EdgeLlmError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PACKAGES: Final = ("onnxruntime", "paho-mqtt", "msgspec", "tokenizers", "numpy")
_PROGRESS_S: Final = 60.0
_DOWN_S: Final = 2.0
_START_TIMEOUT_S: Final = 120.0
_BACK_TIMEOUT_S: Final = 300.0
# Default of serving.metrics_interval_s, and a little more.
_METRICS_TIMEOUT_S: Final = 35.0
_TICK_S: Final = 0.2
_MAX_WARM_UP_MINUTES: Final = 20.0


class RecordLog:
    """The records of a run, in memory and, if asked for, in a file as they come. Used by one thread.

    Args:
        path: of the file, which is written anew; None for none.
    """

    def __init__(self, path: Path | None) -> None:
        self.records: list[Record] = []
        self._file = None if path is None else path.open("wb")

    def add(self, record: Record) -> None:
        """Keep one."""
        self.records.append(record)
        if self._file is not None:
            self._file.write(to_line(record))
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


class Loads:
    """The load processes, and what they have noted.

    Args:
        port: of the broker.
        users: all of them, spread over ``processes``.
        processes: how many.
        rate: acts a second, of all together.
    """

    def __init__(self, port: int, users: Sequence[str], processes: int, rate: float) -> None:
        self._records: queue.SimpleQueue[Record] = queue.SimpleQueue()
        named = [f"{user}:{number}" for number, user in enumerate(users)]
        self._processes = [
            self._start(port, number, rate / processes, named[number::processes]) for number in range(processes)
        ]

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until all have connected and begin. Raises ``ServingError`` if one does not."""
        deadline = time.monotonic() + timeout_s
        waiting = set(range(len(self._processes)))
        while waiting:
            # The first that a process notes are its counts, which are still empty.
            waiting -= {record.process for record in self.records() if isinstance(record, Counts)}
            if time.monotonic() > deadline:
                raise ServingError("the load processes do not connect")
            time.sleep(_TICK_S)

    def records(self) -> Iterator[Record]:
        """What has come since the last call. Raises ``ServingError`` if a process has ended."""
        with contextlib.suppress(queue.Empty):
            while True:
                yield self._records.get_nowait()
        if any(process.poll() not in (None, 0) for process, _ in self._processes):
            raise ServingError("a load process has ended: its message stands above")

    def stop(self) -> None:
        """Let them wait for what is unanswered, note it, and end. Raises ``ServingError`` if one does not."""
        for process, _ in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process, reader in self._processes:
            try:
                process.wait(MAX_DRAIN_S + 30)
            except subprocess.TimeoutExpired:
                raise ServingError("a load process does not end") from None
            reader.join()

    def kill(self) -> None:
        """End those that still run."""
        for process, reader in self._processes:
            process.kill()
            process.wait()
            reader.join()
            assert process.stdout is not None
            process.stdout.close()

    def _start(
        self, port: int, number: int, rate: float, users: Sequence[str]
    ) -> tuple[subprocess.Popen[bytes], threading.Thread]:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.soak.load", str(port), str(number), str(rate), *users],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        reader = threading.Thread(target=self._read, args=(process,), daemon=True)
        reader.start()
        return process, reader

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._records.put(DECODER.decode(line))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; exit status 1 if a bound was missed or not measured, 2 if nothing was, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        records = list(read_records(options.source)) if options.source else measure(options)
        report = make_report(records)
    except (ServingError, RecordError, EdgeLlmError, OSError) as error:
        print(f"benchmarks.soak: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(json.dumps(msgspec.to_builtins(report)) if options.json else format_report(report))
    return 0 if all(bound.reached for bound in report.bounds) else 1


def measure(options: argparse.Namespace) -> list[Record]:
    """Run broker, daemon and load; returns all records.

    Raises:
        ServingError: the daemon, the broker or a load process did not do what the measurement needs.
        EdgeLlmError: the bundle cannot be used, or the broker does not start.
        OSError: ``--out`` cannot be written, or the daemon's process is gone.
    """
    machine = describe_machine(physical_cores(), PACKAGES)
    bundle = Bundle.open(options.bundle or shipped_bundle())
    options.cache_dir.mkdir(parents=True, exist_ok=True)
    prepared_graph(bundle, bundle.manifest.graphs[0].target, options.cache_dir)
    users = [f"u{number}" for number in range(options.users)]
    log = RecordLog(options.out)
    # On the disk of the cache, not in a temporary folder that may be memory: what is written is measured.
    with tempfile.TemporaryDirectory(prefix=".soak-", dir=options.cache_dir) as name, contextlib.closing(log):
        folder = Path(name)
        (folder / "broker").mkdir()
        with ExampleBroker(folder / "broker", [*users, ODD_USER]) as broker:
            daemon = Daemon(bundle, _state_dir(folder, options), broker.port, folder / "daemon.log", _settings(folder))
            host = Host(broker.port)
            try:
                daemon.start()
                host.wait_answered(daemon, _START_TIMEOUT_S)
                host.publish_state()
                start = _start_record(options, machine, bundle, broker.name, folder)
                loads = Loads(broker.port, users, options.processes, options.queries_per_second)
                try:
                    loads.wait_ready(_START_TIMEOUT_S)
                    log.add(msgspec.structs.replace(start, at=time.monotonic()))
                    ended_at = _soak(options, log, daemon, host, broker, loads)
                finally:
                    loads.kill()
                counters = host.wait_metrics(_METRICS_TIMEOUT_S).get("counters", {})
                log_bytes = (folder / "daemon.log").stat().st_size
                log.add(End(at=ended_at, counters=counters, log_bytes=log_bytes))
            finally:
                host.close()
                daemon.stop()
    return log.records


def _soak(
    options: argparse.Namespace, log: RecordLog, daemon: Daemon, host: Host, broker: ExampleBroker, loads: Loads
) -> float:
    """The load, and what is seen meanwhile, with a sample when all has been answered. Returns when the load ended."""
    began = time.monotonic()
    sample_at, restart_at, progress_at = began, began + 60 * options.restart_minutes, began + _PROGRESS_S
    end = began + 60 * options.minutes
    others = OthersShare()
    while (now := time.monotonic()) < end:
        if not daemon.running:
            raise ServingError(f"the daemon has ended: {daemon.last_words()}")
        for record in loads.records():
            log.add(record)
        if now >= sample_at:
            log.add(take_sample(daemon.pid, others.share(), host.metrics))
            others, sample_at = OthersShare(), sample_at + options.sample_s
        if now >= restart_at:
            log.add(restart(broker, daemon, host))
            restart_at = time.monotonic() + 60 * options.restart_minutes
        if now >= progress_at:
            print(format_progress(log.records, now - began, options.minutes), file=sys.stderr, flush=True)
            progress_at += _PROGRESS_S
        time.sleep(_TICK_S)
    ended_at = time.monotonic()
    loads.stop()
    for record in loads.records():
        log.add(record)
    log.add(take_sample(daemon.pid, others.share(), host.metrics))
    return ended_at


def restart(broker: ExampleBroker, daemon: Daemon, host: Host) -> Restart:
    """Kill the broker, start it again after a while, and wait until a query is answered.

    Raises:
        ServingError: none is.
    """
    killed_at = time.monotonic()
    broker.kill()
    time.sleep(_DOWN_S)
    broker.start()
    return Restart(killed_at=killed_at, back_at=host.wait_answered(daemon, _BACK_TIMEOUT_S))


def format_progress(records: Sequence[Record], elapsed_s: float, minutes: float) -> str:
    """One line about a run so far; the latency is of the plain queries of its last minute."""
    queries = [record for record in records if isinstance(record, Done)]
    sample = next(record for record in reversed(records) if isinstance(record, Sample))
    recent = [
        query.answer_ms for query in queries if query.kind in PLAIN_KINDS and query.sent_at > sample.at - _PROGRESS_S
    ]
    shown = f"{percentile(recent, 50):.1f} and {percentile(recent, 99):.1f} ms" if recent else "none"
    again = sum(isinstance(record, Again) for record in records)
    return (
        f"{elapsed_s / 60:.0f} of {minutes:g} min: {len(queries)} queries ended, {again} terminal events came again, "
        f"p50 and p99 {shown}; {sample.rss_anon_mb:.1f} MB, {sample.descriptors} descriptors, {sample.threads} threads"
        f", {sample.written_bytes / 1e6:.1f} MB written; others' CPU {sample.others_cpu:.0%}"
    )


def _state_dir(folder: Path, options: argparse.Namespace) -> Path:
    """A cache folder that holds nothing but the prepared copy."""
    state_dir = folder / "cache"
    state_dir.mkdir()
    (state_dir / "prepared").symlink_to((options.cache_dir / "prepared").resolve())
    return state_dir


def _settings(folder: Path) -> list[str]:
    secret = folder / "mqtt-password"
    secret.touch(mode=0o600)
    secret.write_text(password_of(DAEMON_USER))
    return [f"mqtt.username={DAEMON_USER}", f"mqtt.password_file={secret}"]


def _start_record(
    options: argparse.Namespace, machine: dict[str, Any], bundle: Bundle, broker: str, folder: Path
) -> Start:
    warm_up = options.warm_up_minutes
    return Start(
        at=time.monotonic(),
        minutes=options.minutes,
        warm_up_minutes=round(min(options.minutes / 3, _MAX_WARM_UP_MINUTES), 3) if warm_up is None else warm_up,
        queries_per_second=options.queries_per_second,
        users=options.users,
        restart_minutes=options.restart_minutes,
        bundle=f"{bundle.manifest.name} {bundle.manifest.version}",
        broker=broker,
        counts_writes=counts_writes(folder),
        machine=machine,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=_positive, default=60.0, help="how long (default 60)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.add_argument("--out", type=Path, metavar="FILE", help="keep every record there as it comes (JSON lines)")
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="FILE", help="run nothing: report what an earlier --out FILE holds"
    )
    parser.add_argument("--bundle", type=Path, help="a bundle folder (default: the one that comes with edge_llm)")
    parser.add_argument("--queries-per-second", type=_positive, default=4.0, help="of all users together (default 4)")
    parser.add_argument("--users", type=positive_int, default=8, help="how many (default 8)")
    parser.add_argument("--processes", type=positive_int, default=2, help="that make the load (default 2)")
    parser.add_argument("--restart-minutes", type=_positive, default=10.0, help="between broker restarts (default 10)")
    parser.add_argument("--sample-s", type=_positive, default=5.0, help="between two samples (default 5)")
    parser.add_argument(
        "--warm-up-minutes",
        type=_positive,
        help=f"not counted for memory (default: a third of the run, at most {_MAX_WARM_UP_MINUTES:g})",
    )
    parser.add_argument("--cache-dir", type=Path, default=default_cache_dir(), help="where prepared copies are kept")
    return parser


def _positive(value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise argparse.ArgumentTypeError(f"{value!r} is not a number above 0")
    return number


if __name__ == "__main__":
    # Ended from outside, it ends its daemon, its broker and its load too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
