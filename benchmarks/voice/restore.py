"""What it costs to restore cached tokens: ``python -m benchmarks.voice.restore BUNDLE CACHE_DIR`` prints milliseconds.

It runs in a process of its own, with nothing but the engine.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks.ratios import median
from edge_llm.bundle.manifest import Bundle
from edge_llm.config import Config, EngineConfig
from edge_llm.engine.loading import load_model
from edge_llm.engine.sampler import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Sequence

TOKENS: Final = 200
RUNS: Final = 200
_SLOTS: Final = 4
_ROOT: Final = Path(__file__).parent.parent.parent


def restore_ms(cache: Any, source: int, tokens: int, runs: int) -> list[float]:
    """Read the rows of one slot once, then write them into the other slots, again and again.

    Args:
        cache: an ``edge_llm.engine.kv_cache.KVCache``.
        source: the slot that holds the tokens.
        tokens: how many.
        runs: how often they are written.
    """
    rows = cache.read_rows(source, 0, tokens)
    others = [slot for slot in range(cache.slots) if slot != source]
    for slot in others:
        cache.write_rows(slot, 0, rows)  # makes the slot's pages resident
    times = []
    for run in range(runs):
        started = time.perf_counter()
        cache.write_rows(others[run % len(others)], 0, rows)
        times.append((time.perf_counter() - started) * 1e3)
    return times


def measure_restore(bundle: Bundle, cache_dir: Path) -> float | None:
    """The median in milliseconds, measured in a child process; None, with a line on standard error, if it fails."""
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.voice.restore", str(bundle.path), str(cache_dir)],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        print(f"benchmarks.voice: restore: {lines[-1]}", file=sys.stderr)
        return None
    return median(json.loads(result.stdout))


def main(arguments: Sequence[str]) -> None:
    """Prefill, read, write; prints a JSON list of milliseconds."""
    path, cache_dir = arguments
    config = Config(bundle=path, cache_dir=cache_dir, engine=EngineConfig(slots=_SLOTS))
    engine = load_model(Bundle.open(Path(path)), config).engine
    tokens = min(TOKENS, engine.max_seq_len - 1)
    state = engine.start([3 + index % 100 for index in range(tokens)], SamplingParams(), max_tokens=1)
    while not state.prefilled:
        engine.prefill(state)
    print(json.dumps(restore_ms(engine.runner.cache, state.slot, tokens, RUNS)))


if __name__ == "__main__":
    main(sys.argv[1:])
