"""From the end of speech to the first word: ``python -m benchmarks.voice [--json]`` (docs/benchmarks.md).

A trace of spoken queries is said word by word to ``edge-llm serve`` with more and more of its caches on, and to
llama.cpp with its own reuse of prompts; one after the other, each in a process of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from benchmarks.files.bundles import TARGET, smollm2_bundle
from benchmarks.files.cache import default_cache_dir
from benchmarks.lineup import CONTEXT
from benchmarks.machine import describe_machine
from benchmarks.voice.client import UNHEARD_S
from benchmarks.voice.modes import LISTENING_MODES, MAX_TOKENS, OWN_MODES, Amounts, Extras, ModeRun, run_mode
from benchmarks.voice.peer import PEER_MODES, run_peer
from benchmarks.voice.plot import distribution_svg
from benchmarks.voice.prompts import Prompts
from benchmarks.voice.report import format_progress, format_report, make_report
from benchmarks.voice.restore import measure_restore
from benchmarks.voice.trace import SEED, make_trace, spoken_s
from benchmarks.voice.words import SYSTEM_PROMPT
from edge_llm.arguments import positive_int
from edge_llm.bundle.manifest import Bundle
from edge_llm.bundle.prepare import prepared_graph
from edge_llm.device.cpu import physical_cores
from edge_llm.local_broker import mosquitto_path

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.voice.trace import Utterance

PACKAGES: Final = ("onnxruntime", "paho-mqtt", "msgspec", "tokenizers", "llama-cpp-python", "numpy")
MODES: Final = (*OWN_MODES, *PEER_MODES)
# Rough times for the estimate.
_ANSWER_S: Final = 0.35
_PAIR_S: Final = 1.6
_HIT_S: Final = 0.05
_SOAK_QUERY_S: Final = 0.1
_START_S: Final = 10.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; exit status 1 if a goal was missed or not measured, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    trace = make_trace(options.queries, options.seed)
    amounts = Amounts(options.speed, options.hits, options.pairs, options.soak_queries)
    print(f"this takes about {expected_s(trace, options.modes, amounts) / 60:.0f} minutes", file=sys.stderr)
    machine = describe_machine(physical_cores(), PACKAGES)
    try:
        path = options.bundle or smollm2_bundle(options.cache_dir, CONTEXT)
        prepared_dir = options.cache_dir if options.bundle else path.parent
        bundle = Bundle.open(path)
        prepared_graph(bundle, TARGET, prepared_dir)
        prompts = Prompts(bundle, SYSTEM_PROMPT)
        machine["run"] = describe_run(bundle, prompts, trace, options)
        # The client's own collections would count as latency.
        gc.collect()
        gc.freeze()
        restore_ms = measure_restore(bundle, prepared_dir)
        runs: list[ModeRun] = []
        extras = Extras()
        for mode in options.modes:
            if mode in PEER_MODES:
                run = run_peer(mode, bundle, options.cache_dir, prompts, physical_cores(), trace, options.speed)
            else:
                run, more = run_mode(mode, bundle, prepared_dir, prompts, trace, amounts)
                extras = more if mode == "speculative" else extras
            runs.append(run)
            print(format_progress(run), file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    machine["run"]["pair_prefetched_tokens"] = extras.pair_prefetched_tokens
    machine["run"]["rss_quarters_mb"] = extras.rss_quarters_mb
    report = make_report(machine, runs, extras, restore_ms)
    if options.plot is not None:
        _write_plot(options.plot, runs)
    print(json.dumps(msgspec.to_builtins(report)) if options.json else format_report(report))
    return 0 if all(goal.reached for goal in report.goals) else 1


def describe_run(
    bundle: Bundle, prompts: Prompts, trace: Sequence[Utterance], options: argparse.Namespace
) -> dict[str, Any]:
    """What was run; stands beside what it ran on."""
    return {
        "bundle": f"{bundle.manifest.name} {bundle.manifest.version}",
        "context": bundle.manifest.model.max_seq_len,
        "broker": "mosquitto" if mosquitto_path() else "iotcore",
        "queries": len(trace),
        "repeated": sum(utterance.asked_before for utterance in trace),
        "revised": sum(utterance.revision is not None for utterance in trace),
        "seed": options.seed,
        "speed": options.speed,
        "max_tokens": MAX_TOKENS,
        "system_tokens": prompts.shared_tokens,
    }


def expected_s(trace: Sequence[Utterance], modes: Sequence[str], amounts: Amounts) -> float:
    """About how long a run takes."""
    seconds = len(modes) * (_START_S + len(trace) * _ANSWER_S)
    for mode in modes:
        words_s = spoken_s(trace) if mode in LISTENING_MODES else len(trace) * UNHEARD_S
        seconds += words_s / amounts.speed
    if "speculative" in modes:
        seconds += amounts.hits * _HIT_S + amounts.pairs * _PAIR_S + amounts.soak * _SOAK_QUERY_S
    return seconds


def _write_plot(path: Path, runs: Sequence[ModeRun]) -> None:
    measured = {run.mode: [sample.first_ms for sample in run.samples] for run in runs if run.status == "ok"}
    try:
        picture = distribution_svg("Share of queries answered within a time", measured)
    except ValueError:
        print("benchmarks.voice: nothing was measured, so there is no plot", file=sys.stderr)
    else:
        path.write_text(picture, encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.voice", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="write the distributions as a picture")
    parser.add_argument("--queries", type=positive_int, default=200, help="how many are said (default 200)")
    parser.add_argument("--speed", type=_speed, default=1.0, help="times real time, for quick runs (default 1)")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the trace (default {SEED})")
    parser.add_argument("--hits", type=int, default=200, help="repeated queries after the trace (default 200)")
    parser.add_argument("--pairs", type=int, default=60, help="with and without prefetch going on (default 60)")
    parser.add_argument("--soak-queries", type=int, default=2000, help="for the growth of memory (default 2000)")
    parser.add_argument(
        "--modes", type=_modes, default=list(MODES), help=f"comma-separated (default {','.join(MODES)})"
    )
    parser.add_argument("--bundle", type=Path, help="a bundle folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--cache-dir", type=Path, default=default_cache_dir(), help="where models are kept")
    return parser


def _speed(value: str) -> float:
    speed = float(value)
    if not speed > 0:
        raise argparse.ArgumentTypeError("more than 0")
    return speed


def _modes(value: str) -> list[str]:
    names = value.split(",")
    for name in names:
        if name not in MODES:
            raise argparse.ArgumentTypeError(f"no mode {name!r}, only {', '.join(MODES)}")
    return names


if __name__ == "__main__":
    # Ended from outside, it ends its daemon and its broker too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
