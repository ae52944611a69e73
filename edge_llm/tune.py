"""``edge-llm tune``: measure threads, prefill chunk and slots on this machine, and keep the best for the daemon.

The result is laid over the device file from then on (device/profile.py); whatever a config file sets still wins.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from edge_llm.bench import prefill_all
from edge_llm.device.cpu import physical_cores
from edge_llm.device.memory import available_memory
from edge_llm.engine.loading import load_model, memory_needs
from edge_llm.engine.sampler import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edge_llm.bundle.manifest import Bundle
    from edge_llm.config import Config
    from edge_llm.engine.engine import Engine

_CHUNKS: Final = (8, 16, 32, 64, 128)
_SLOTS: Final = (1, 2, 4, 8)
_PROMPT_TOKENS: Final = 32
_ROUNDS: Final = 5
_DECODE_STEPS: Final = 16
# A smaller setting is taken if it is nearly as fast: fewer threads leave cores to others, shorter chunks let others in.
_NEARLY: Final = 1.05
_NEARLY_CHUNK: Final = 1.15
_NEARLY_SLOTS: Final = 1.10


@dataclass(frozen=True)
class Tuned:
    """What was measured, and what is best.

    Attributes:
        threads: threads within an operator.
        prefill_chunk: prompt tokens run at once.
        slots: queries answered at once.
        answer_ms: a short answer to a short prompt, by threads.
        prefill_ms_per_token: by chunk, with the chosen threads.
        tokens_per_s: of all sequences together, by slots, with the chosen threads.
    """

    threads: int
    prefill_chunk: int
    slots: int
    answer_ms: dict[int, float]
    prefill_ms_per_token: dict[int, float]
    tokens_per_s: dict[int, float]

    def settings(self) -> dict[str, int]:
        """The keys of ``[engine]``."""
        return {"threads": self.threads, "prefill_chunk": self.prefill_chunk, "slots": self.slots}


def tune(bundle: Bundle, config: Config, report: Callable[[str], object]) -> Tuned:
    """Measure on this machine; nothing else should be running.

    Args:
        bundle: what will be served.
        config: provider and graph; threads, chunk and slots are what is measured.
        report: told one line now and then.

    Raises:
        BundleError: the bundle cannot be served here.
        MemoryPlanError: not even one slot fits.
    """
    most = _slots_that_fit(bundle, config)
    # 1. Threads, by what a single short answer takes, its prompt included: people wait for that.
    answer_ms = {}
    for threads in _thread_counts():
        engine = _engine(bundle, config, threads, 1)
        answer_ms[threads] = _prefill_ms(engine, _PROMPT_TOKENS) + _decode_ms(engine, 1) * _DECODE_STEPS
        report(f"threads {threads}: {answer_ms[threads]:.1f} ms for {_DECODE_STEPS} tokens after {_PROMPT_TOKENS}")
    threads = smallest_nearly_best(answer_ms, _NEARLY)
    engine = _engine(bundle, config, threads, most)
    # 2. The chunk, by what a token of the prompt takes.
    prefill = {}
    for chunk in (chunk for chunk in _CHUNKS if 2 * chunk <= engine.max_seq_len):
        prefill[chunk] = _prefill_ms(engine, chunk) / chunk
        report(f"chunk {chunk}: {prefill[chunk]:.3f} ms a prompt token")
    # 3. Slots, by what all of them give together.
    together = {}
    for slots in (slots for slots in _SLOTS if slots <= most):
        together[slots] = slots / _decode_ms(engine, slots) * 1e3
        report(f"slots {slots}: {together[slots]:.0f} tokens/s together")
    return Tuned(
        threads=threads,
        prefill_chunk=smallest_nearly_best(prefill, _NEARLY_CHUNK),
        slots=smallest_nearly_best({slots: 1 / rate for slots, rate in together.items()}, _NEARLY_SLOTS),
        answer_ms=answer_ms,
        prefill_ms_per_token=prefill,
        tokens_per_s=together,
    )


def smallest_nearly_best(costs: dict[int, float], factor: float) -> int:
    """The smallest setting that costs at most ``factor`` times what the best one does."""
    bound = min(costs.values()) * factor
    return min(setting for setting, cost in costs.items() if cost <= bound)


def _thread_counts() -> list[int]:
    cores = physical_cores()
    return sorted({count for count in (1, 2, 3, 4, 6, 8, 12, 16) if count < cores} | {cores})


def _slots_that_fit(bundle: Bundle, config: Config) -> int:
    """The most of ``_SLOTS`` that leave half of the memory to others; one at least, which loading checks."""
    available = available_memory()
    fitting = 1
    for slots in _SLOTS:
        engine = msgspec.structs.replace(config.engine, slots=slots)
        needs = memory_needs(bundle, msgspec.structs.replace(config, engine=engine), bundle.manifest.graphs[0])
        if available is None or sum(needs.values()) <= available.nbytes / 2:
            fitting = slots
    return fitting


def _engine(bundle: Bundle, config: Config, threads: int, slots: int) -> Engine:
    engine = msgspec.structs.replace(config.engine, threads=threads, slots=slots, prefill_chunk=max(_CHUNKS))
    return load_model(bundle, msgspec.structs.replace(config, engine=engine)).engine


def _decode_ms(engine: Engine, count: int) -> float:
    """Milliseconds of a step with ``count`` sequences, the median of all steps."""
    states = [engine.start(_prompt(_PROMPT_TOKENS), SamplingParams(), _DECODE_STEPS + 2) for _ in range(count)]
    for state in states:
        # A stop token would end the measurement early.
        state.stop_token_ids = frozenset()
        prefill_all(engine, state)
    engine.decode(states)  # the first one binds
    times = []
    for _ in range(_DECODE_STEPS):
        started = time.perf_counter()
        engine.decode(states)
        times.append((time.perf_counter() - started) * 1e3)
    for state in states:
        engine.release(state)
    return statistics.median(times)


def _prefill_ms(engine: Engine, chunk: int) -> float:
    """Milliseconds of a chunk, the median of some."""
    times = []
    for _ in range(_ROUNDS + 1):
        state = engine.start(_prompt(chunk), SamplingParams(), 1)
        started = time.perf_counter()
        prefill_all(engine, state)
        times.append((time.perf_counter() - started) * 1e3)
        engine.release(state)
    return statistics.median(times[1:])


def _prompt(length: int) -> Sequence[int]:
    return [3 + index % 50 for index in range(length)]
