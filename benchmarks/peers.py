"""This runtime beside its peers on the same weights: ``python -m benchmarks.peers [--json]`` (docs/benchmarks.md).

Each engine runs in a process of its own; they take turns, one at a time, and the ratios are taken round by round.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from benchmarks.files.cache import default_cache_dir, evict
from benchmarks.lineup import CONTEXT, MODELS, OWN, lineup, prompt_ids
from benchmarks.machine import describe_machine, format_machine
from benchmarks.ratios import GOALS, Goal, Ratio, compare, judge, median
from benchmarks.turns import PREFILL_TOKENS, Turns, Worker, take_turns
from edge_llm.device.cpu import physical_cores

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PACKAGES: Final = ("onnxruntime", "ctranslate2", "optimum-onnx", "transformers", "torch", "llama-cpp-python", "numpy")
MIN_ROUNDS: Final = 10


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One engine on one model: medians over the rounds, or a ``status`` that says why there are none.

    ``same_tokens`` is how many of its greedy tokens equal this runtime's, counted from the first.
    """

    model: str
    engine: str
    version: str | None
    prefill_64_ms: float | None
    decode_ms: float | None
    load_s: float | None
    rss_anon_mb: float | None
    rss_file_mb: float | None
    same_tokens: int | None
    status: str


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that was measured.

    ``others_cpu_percent`` is the median share of the busy time that other processes took; ``repeated_turns`` were taken
    again because it was too much.
    """

    machine: dict[str, Any]
    context: int
    rounds: int
    others_cpu_percent: float
    repeated_turns: int
    rows: list[Row]
    ratios: list[Ratio]
    goals: list[Goal]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; exit status 1 if a goal was missed, or a peer that a goal needs was not measured."""
    options = _parser().parse_args(arguments)
    machine = describe_machine(options.threads, PACKAGES)
    results = {
        model: measure(model, options.engines, options.cache_dir, options.threads, options.rounds)
        for model in options.models
    }
    report = make_report(machine, options.rounds, results)
    print(json.dumps(msgspec.to_builtins(report)) if options.json else format_report(report))
    return 0 if all(goal.reached for goal in report.goals) else 1


def measure(model: str, wanted: Sequence[str], cache_dir: Path, threads: int, rounds: int) -> list[Turns]:
    """Prepare the files of every engine of a model, then let them take turns."""
    starters: dict[str, Callable[[], Worker]] = {}
    results: dict[str, Turns] = {}
    for entrant in lineup(model):
        if wanted and entrant.engine not in wanted:
            continue
        result = results[entrant.engine] = Turns(entrant.engine)
        if (missing := entrant.missing) is not None:
            result.status = missing
            continue
        try:
            path = entrant.prepare(cache_dir)
        except Exception as error:  # a peer's converter may raise anything, and the others go on
            result.status = f"failed: {(str(error).strip() or repr(error)).splitlines()[-1]}"
            continue
        starters[entrant.engine] = functools.partial(_start, entrant.load, path, threads)
    for turns in take_turns(starters, prompt_ids(model, PREFILL_TOKENS), rounds):
        results[turns.engine] = turns
    return list(results.values())


def _start(load: str, path: Path, threads: int) -> Worker:
    evict(path.parent)
    return Worker(load, path, threads, CONTEXT)


def make_report(machine: dict[str, Any], rounds: int, results: dict[str, list[Turns]]) -> Report:
    """Rows, ratios and goals from the turns of each model."""
    rows: list[Row] = []
    ratios: list[Ratio] = []
    others: list[float] = []
    for model, engines in results.items():
        own = next((turns for turns in engines if turns.engine == OWN and turns.ok), None)
        for turns in engines:
            rows.append(_row(model, turns, own))
            others += turns.others_cpu
            if own is None or turns is own or not turns.ok:
                continue
            ratios.append(compare(model, turns.engine, "prefill_64_ms", turns.prefill_ms, own.prefill_ms))
            ratios.append(compare(model, turns.engine, "decode_ms", turns.decode_ms, own.decode_ms))
    return Report(
        machine=machine,
        context=CONTEXT,
        rounds=rounds,
        others_cpu_percent=round(100 * median(others), 1) if others else 0.0,
        repeated_turns=sum(turns.repeated for engines in results.values() for turns in engines),
        rows=rows,
        ratios=ratios,
        goals=[outcome for goal in GOALS if goal.model in results for outcome in judge(goal, ratios)],
    )


def format_report(report: Report) -> str:
    """The report as a table for people, losing rows included."""
    lines = [
        format_machine(report.machine),
        f"{report.rounds} rounds in turns, prompt {PREFILL_TOKENS} tokens, context {report.context}, batch 1; "
        f"other processes took {report.others_cpu_percent} % of the busy time, "
        f"{report.repeated_turns} disturbed turns were repeated",
        "",
        f"{'model':13} {'engine':26} {'prefill 64':>11} {'decode':>9} {'x ours (10th pct)':>28} {'load':>7} "
        f"{'anon':>7} {'file':>6} {'same':>5}  version",
        f"{'':13} {'':26} {'ms':>11} {'ms/token':>9} {'prefill':>14}{'decode':>14} {'s':>7} {'MB':>7} {'MB':>6} "
        f"{'tokens':>5}",
    ]
    by_key = {(ratio.model, ratio.peer, ratio.metric): ratio for ratio in report.ratios}
    for row in report.rows:
        if row.status != "ok":
            lines.append(f"{row.model:13} {row.engine:26} {row.status}")
            continue
        prefill = by_key.get((row.model, row.engine, "prefill_64_ms"))
        decode = by_key.get((row.model, row.engine, "decode_ms"))
        lines.append(
            f"{row.model:13} {row.engine:26} {row.prefill_64_ms:>11.1f} {row.decode_ms:>9.2f} "
            f"{_times(prefill):>14}{_times(decode):>14} {row.load_s:>7.2f} {row.rss_anon_mb:>7.0f} "
            f"{row.rss_file_mb:>6.0f} {row.same_tokens!s:>5}  {row.version}"
        )
    lines.append("")
    lines += [_goal_line(goal) for goal in report.goals]
    return "\n".join(lines)


def _row(model: str, turns: Turns, own: Turns | None) -> Row:
    same = None
    if turns.ok and own is not None:
        pairs = zip(turns.token_ids, own.token_ids, strict=True)
        same = next((index for index, (a, b) in enumerate(pairs) if a != b), len(own.token_ids))
    return Row(
        model=model,
        engine=turns.engine,
        version=turns.version,
        prefill_64_ms=round(median(turns.prefill_ms), 2) if turns.ok else None,
        decode_ms=round(median(turns.decode_ms), 3) if turns.ok else None,
        load_s=turns.load_s,
        rss_anon_mb=turns.rss_anon_mb,
        rss_file_mb=turns.rss_file_mb,
        same_tokens=same,
        status=turns.status,
    )


def _times(ratio: Ratio | None) -> str:
    return "" if ratio is None else f"{ratio.median:.2f} ({ratio.p10:.2f})"


def _goal_line(goal: Goal) -> str:
    verdict = {True: "reached", False: "MISSED", None: "not measured"}[goal.reached]
    shown = "" if goal.median is None else f", is {goal.median:.2f}x"
    what = "prefill of 64" if goal.metric == "prefill_64_ms" else "decode"
    return f"{verdict:13} {goal.model}: {what} at least {goal.at_least}x {goal.peer}{shown}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--rounds", type=_rounds, default=20, help=f"at least {MIN_ROUNDS} (default 20)")
    parser.add_argument(
        "--models", type=_models, default=list(MODELS), help=f"comma-separated (default {','.join(MODELS)})"
    )
    parser.add_argument(
        "--engines",
        type=lambda value: value.split(","),
        default=[],
        help="comma-separated, as in the rows (default all)",
    )
    parser.add_argument("--threads", type=int, default=physical_cores(), help="of every engine (default: the cores)")
    parser.add_argument("--cache-dir", type=Path, default=default_cache_dir(), help="where models are kept")
    return parser


def _rounds(value: str) -> int:
    rounds = int(value)
    if rounds < MIN_ROUNDS:
        raise argparse.ArgumentTypeError(f"a median needs at least {MIN_ROUNDS} rounds")
    return rounds


def _models(value: str) -> list[str]:
    names = value.split(",")
    for name in names:
        if name not in MODELS:
            raise argparse.ArgumentTypeError(f"no model {name!r}, only {', '.join(MODELS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
