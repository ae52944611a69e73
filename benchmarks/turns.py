"""Engines take turns: A B C A B C …, so that a slow minute of the machine falls on all of them."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks.process import cpu_seconds, machine_busy_seconds
from benchmarks.ratios import median

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PREFILL_TOKENS: Final = 64
DECODE_TOKENS: Final = 64
PREFILL_RUNS: Final = 3
# A turn that others disturbed is taken again; after so many attempts it counts as it is.
MAX_OTHERS_CPU: Final = 0.1
MAX_ATTEMPTS: Final = 6
_PAUSE_S: Final = 0.5
_ROOT: Final = Path(__file__).parent.parent
_LOAD_TIMEOUT_S: Final = 300.0
_TURN_TIMEOUT_S: Final = 120.0


class WorkerError(Exception):
    """The engine cannot be measured; the message is the reason for its row."""


@dataclass
class Turns:
    """What one engine has shown: a value a round, or the reason why there is none.

    ``others_cpu`` is the share of the busy time that other processes took in each counted turn; ``repeated`` counts the
    turns that were taken again because that was more than ``MAX_OTHERS_CPU``.
    """

    engine: str
    version: str | None = None
    status: str = "ok"
    load_s: float | None = None
    rss_anon_mb: float | None = None
    rss_file_mb: float | None = None
    prefill_ms: list[float] = field(default_factory=list)
    decode_ms: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    others_cpu: list[float] = field(default_factory=list)
    repeated: int = 0

    @property
    def ok(self) -> bool:
        """It was measured in every round."""
        return self.status == "ok"


class Worker:
    """A running ``benchmarks.worker``.

    Args:
        entry: ``module:function`` of the engine's ``load``.
        path: its model.
        threads: for the engine.
        context: positions of its cache.
    """

    def __init__(self, entry: str, path: Path, threads: int, context: int) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", entry, str(path), str(threads), str(context)],
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"},
        )
        self._buffer = b""

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def hello(self) -> dict[str, Any]:
        """What it says once the model is loaded. Raises ``WorkerError``."""
        return self._read(_LOAD_TIMEOUT_S)

    def measure(self, prompt_ids: Sequence[int]) -> dict[str, Any]:
        """Take one turn; the reply comes when its threads are quiet again. Raises ``WorkerError``."""
        request = {"prompt_ids": list(prompt_ids), "decode_tokens": DECODE_TOKENS, "prefill_runs": PREFILL_RUNS}
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None
        return self._read(_TURN_TIMEOUT_S)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _read(self, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([descriptor], [], [], timeout_s)
            if not ready:
                raise WorkerError(f"failed: no answer within {timeout_s:.0f} s")
            block = os.read(descriptor, 1 << 16)
            if not block:
                raise self._failure()
            self._buffer += block
        line, _, self._buffer = self._buffer.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _failure(self) -> WorkerError:
        self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return WorkerError(f"failed: {lines[-1] if lines else f'exit status {self._process.returncode}'}")


def take_turns(starters: dict[str, Callable[[], Worker]], prompt_ids: Sequence[int], rounds: int) -> list[Turns]:
    """Start one worker after the other, let each take a warm-up turn, then ``rounds`` turns, and end them.

    A worker that fails is out from there on, and its row says why.
    """
    results = {name: Turns(name) for name in starters}
    workers: dict[str, Worker] = {}
    try:
        for name, start in starters.items():
            workers[name] = start()
            _load(workers[name], results[name])
        for round_number in range(-1, rounds):
            for name, worker in workers.items():
                if results[name].ok:
                    _take_turn(worker, results[name], prompt_ids, warm_up=round_number < 0)
            _show_progress(round_number + 1, rounds)
    finally:
        for worker in workers.values():
            worker.close()
    return list(results.values())


def _load(worker: Worker, result: Turns) -> None:
    try:
        hello = worker.hello()
    except WorkerError as error:
        result.status = str(error)
    else:
        result.version, result.load_s = hello["version"], round(hello["load_s"], 3)


def _show_progress(done: int, rounds: int) -> None:
    if sys.stderr.isatty():
        print(f"\rround {done} of {rounds}", end="\n" if done == rounds else "", file=sys.stderr, flush=True)


def _take_turn(worker: Worker, result: Turns, prompt_ids: Sequence[int], *, warm_up: bool) -> None:
    for attempt in range(1 if warm_up else MAX_ATTEMPTS):
        if attempt:
            result.repeated += 1
            time.sleep(_PAUSE_S)
        try:
            own, machine = cpu_seconds(worker.pid), machine_busy_seconds()
            reply = worker.measure(prompt_ids)
            own, machine = cpu_seconds(worker.pid) - own, machine_busy_seconds() - machine
        except WorkerError as error:
            result.status = str(error)
            return
        others_cpu = max(0.0, machine - own) / max(machine, 1e-9)
        if others_cpu <= MAX_OTHERS_CPU:
            break
    result.rss_anon_mb, result.rss_file_mb = reply["rss_anon_mb"], reply["rss_file_mb"]
    result.token_ids = reply["token_ids"]
    if not warm_up:
        result.prefill_ms.append(median(reply["prefill_ms"]))
        result.decode_ms.append(median(reply["decode_ms"]))
        result.others_cpu.append(others_cpu)
