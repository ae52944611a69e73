"""``edge-llm bench``: what this machine does with this bundle, without a broker."""

from __future__ import annotations

import platform
import statistics
import time
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np
import onnxruntime as ort

from edge_llm.device.cpu import physical_cores
from edge_llm.device.memory import rss_bytes
from edge_llm.engine.sampler import SamplingParams

if TYPE_CHECKING:
    from edge_llm.engine.engine import Engine, GenerationState
    from edge_llm.engine.loading import LoadedModel

PREFILL_LENGTHS: Final = (16, 64, 256)
DECODE_PROMPT_TOKENS: Final = 64
DECODE_TOKENS: Final = 64


class BenchResult(msgspec.Struct, frozen=True):
    """Medians over ``rounds``. Times are milliseconds but for ``load_s``; memory is decimal megabytes.

    ``python_overhead_ms`` is a decode step's time minus the time inside ONNX Runtime. ``rss_anon_mb`` is taken after
    the runs, ``kv_mb`` is the whole cache's size, of which only touched pages are resident.
    """

    bundle: str
    machine: str
    onnxruntime: str
    provider: str
    prepared: bool
    threads: int
    rounds: int
    load_s: float
    rss_anon_mb: float
    kv_mb: float
    prefill_ms: dict[str, float]
    decode_ms: dict[str, float]
    python_overhead_ms: float


class _TimedSession:
    """Stands in for the runner's session and adds up the time spent inside it."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.spent_s = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_iobinding(self, binding: Any, options: Any = None) -> None:
        """Run and time it."""
        started = time.perf_counter()
        self._session.run_with_iobinding(binding, options)
        self.spent_s += time.perf_counter() - started


def run_bench(model: LoadedModel, threads: int, rounds: int = 5) -> BenchResult:
    """Measure prefill by prompt length, decode steps at batch 1, and the engine's own Python time.

    Args:
        model: a loaded model that nothing else is using.
        threads: as configured; 0 is reported as the physical cores that it stands for.
        rounds: repetitions; the first of each kind is a warm-up and not counted.
    """
    engine = model.engine
    vocab_size = engine.runner.dims.vocab_size
    token_ids = np.random.default_rng(0).integers(0, vocab_size, max(PREFILL_LENGTHS)).tolist()
    lengths = [length for length in PREFILL_LENGTHS if length + DECODE_TOKENS <= engine.max_seq_len]
    prefill_ms = {str(length): _prefill_ms(engine, token_ids[:length], rounds) for length in lengths}
    steps_ms, overhead_ms = _decode_ms(engine, token_ids[: min(DECODE_PROMPT_TOKENS, engine.max_seq_len // 2)], rounds)
    return BenchResult(
        bundle=f"{model.bundle.manifest.name} {model.bundle.manifest.version}",
        machine=f"{platform.machine()}, {physical_cores()} cores",
        onnxruntime=ort.__version__,
        provider=model.provider.name,
        prepared=model.prepared,
        threads=threads or physical_cores(),
        rounds=rounds,
        load_s=round(model.load_s, 3),
        rss_anon_mb=round(rss_bytes()["anon"] / 1e6, 1),
        kv_mb=round(engine.runner.cache.nbytes / 1e6, 1),
        prefill_ms=prefill_ms,
        decode_ms={
            "p50": round(float(np.percentile(steps_ms, 50)), 3),
            "p99": round(float(np.percentile(steps_ms, 99)), 3),
        },
        python_overhead_ms=round(overhead_ms, 4),
    )


def format_bench(result: BenchResult) -> str:
    """The result as lines for people."""
    lines = [
        f"{result.bundle} on {result.machine}, onnxruntime {result.onnxruntime}, {result.provider}, "
        f"{result.threads} threads{', prepared copy' if result.prepared else ''}",
        f"  load             {result.load_s:8.3f} s",
    ]
    lines += [f"  prefill {length:>4}     {ms:8.2f} ms" for length, ms in result.prefill_ms.items()]
    lines += [
        f"  decode p50       {result.decode_ms['p50']:8.2f} ms/token",
        f"  decode p99       {result.decode_ms['p99']:8.2f} ms/token",
        f"  Python overhead  {result.python_overhead_ms:8.3f} ms/token",
        f"  anonymous RSS    {result.rss_anon_mb:8.1f} MB (the whole KV cache is {result.kv_mb:.1f} MB)",
    ]
    return "\n".join(lines)


def _prefill_ms(engine: Engine, token_ids: list[int], rounds: int) -> float:
    times = []
    for _ in range(rounds + 1):
        state = engine.start(token_ids, SamplingParams(), max_tokens=1)
        started = time.perf_counter()
        prefill_all(engine, state)
        times.append((time.perf_counter() - started) * 1e3)
        engine.release(state)
    return round(statistics.median(times[1:]), 3)


def _decode_ms(engine: Engine, token_ids: list[int], rounds: int) -> tuple[list[float], float]:
    """Every step's milliseconds, and the median round's milliseconds a step outside of ONNX Runtime."""
    runner = engine.runner
    timed = _TimedSession(runner.session)
    runner.session = timed
    steps_ms: list[float] = []
    overheads_ms: list[float] = []
    try:
        for round_number in range(rounds + 1):
            state = engine.start(token_ids, SamplingParams(), DECODE_TOKENS + 1)
            # A stop token would end the measurement early, and random tokens may well lead to one.
            state.stop_token_ids = frozenset()
            prefill_all(engine, state)
            timed.spent_s = 0.0
            round_ms = []
            while not state.finished:
                started = time.perf_counter()
                engine.decode([state])
                round_ms.append((time.perf_counter() - started) * 1e3)
            engine.release(state)
            if round_number:
                steps_ms += round_ms
                overheads_ms.append((sum(round_ms) - timed.spent_s * 1e3) / len(round_ms))
    finally:
        runner.session = timed._session
    return steps_ms, statistics.median(overheads_ms)


def prefill_all(engine: Engine, state: GenerationState) -> None:
    """Run a sequence's prompt to its end."""
    while not state.prefilled:
        engine.prefill(state)
