"""One engine in a process of its own: ``python -m benchmarks.worker MODULE:LOAD PATH THREADS CONTEXT``.

It answers one JSON object a line on standard output with one on standard input (benchmarks/turns.py is the other end).
Between its turns it waits for a line and uses no processor.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks.process import memory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.engines import EngineUnderTest, LoadEngine

_SETTLE_WINDOW_S: Final = 0.05
_SETTLE_TIMEOUT_S: Final = 3.0


def main(arguments: Sequence[str]) -> None:
    """Serve requests until standard input ends."""
    entry, path, threads, context = arguments
    # Libraries print to standard output too: the replies get a descriptor of their own.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    module, function = entry.split(":")
    load: LoadEngine = getattr(importlib.import_module(module), function)
    started = time.perf_counter()
    engine = load(Path(path), int(threads), int(context))
    reply: dict[str, Any] = {"version": engine.version, "load_s": time.perf_counter() - started}
    print(json.dumps(reply), file=replies, flush=True)
    for line in sys.stdin:
        reply = measure(engine, **json.loads(line))
        settle()
        resident = memory(os.getpid())
        reply |= {"rss_anon_mb": resident.rss_anon_mb, "rss_file_mb": resident.rss_file_mb}
        print(json.dumps(reply), file=replies, flush=True)


def measure(
    engine: EngineUnderTest, prompt_ids: Sequence[int], decode_tokens: int, prefill_runs: int
) -> dict[str, Any]:
    """Times of one turn.

    Args:
        engine: a loaded engine.
        prompt_ids: the prompt.
        decode_tokens: how many decode steps follow the prefill.
        prefill_runs: how often the prompt is run, the last time with the decode steps behind it.

    Returns:
        ``prefill_ms`` of every run, ``decode_ms`` of every step, and the ``token_ids`` that were generated.
    """
    prefill_ms: list[float] = []
    for run in range(prefill_runs):
        known_at: list[float] = []
        token_ids: list[int] = []

        def on_token(token_id: int, times: list[float] = known_at, ids: list[int] = token_ids) -> None:
            times.append(time.perf_counter())
            ids.append(token_id)

        count = decode_tokens + 1 if run == prefill_runs - 1 else 1
        started = time.perf_counter()
        engine.generate(prompt_ids, count, on_token)
        if len(token_ids) != count:
            raise RuntimeError(f"{len(token_ids)} tokens were generated instead of {count}")
        prefill_ms.append((known_at[0] - started) * 1e3)
    decode_ms = [(after - before) * 1e3 for before, after in itertools.pairwise(known_at)]
    return {"prefill_ms": prefill_ms, "decode_ms": decode_ms, "token_ids": token_ids}


def settle() -> None:
    """Wait until this process's threads have stopped spinning (OpenMP's do so for up to 200 ms after a run)."""
    deadline = time.monotonic() + _SETTLE_TIMEOUT_S
    while time.monotonic() < deadline:
        before = time.process_time()
        time.sleep(_SETTLE_WINDOW_S)
        if time.process_time() - before < _SETTLE_WINDOW_S / 50:
            return


if __name__ == "__main__":
    main(sys.argv[1:])
