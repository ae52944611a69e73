"""Rows, goals and lines from what was measured."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import msgspec

from benchmarks.machine import format_machine
from benchmarks.ratios import percentile
from benchmarks.voice.modes import HIT_SOURCES, MAX_CACHE_BYTES, Extras, ModeRun
from benchmarks.voice.peer import PEER

if TYPE_CHECKING:
    from collections.abc import Sequence


PERCENTILES: Final = (50, 95, 99)
_BASE_MODE: Final = "prefix"
_GAINING_MODES: Final = ("partials", "speculative")


class Hits(msgspec.Struct, frozen=True, kw_only=True):
    """Queries that nobody had asked before, and whose answers were ready all the same."""

    count: int
    p50_ms: float | None
    p99_ms: float | None


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One mode, from the end of speech to the first text in milliseconds, or a ``status`` that says why there is none.

    ``new`` are the queries never asked before, ``repeated`` the others. ``sources`` and ``cached_from`` are shares of
    the queries. Tokens are means per query: ``computed`` and ``wasted`` by prefetch. ``gain`` is how many times the
    mode ``prefix`` takes as long.
    """

    mode: str
    status: str
    queries: int
    p50_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    new_queries: int = 0
    new_p50_ms: float | None = None
    new_p95_ms: float | None = None
    new_p99_ms: float | None = None
    repeated_p50_ms: float | None = None
    repeated_p99_ms: float | None = None
    sources: dict[str, float] = {}
    cached_from: dict[str, float] = {}
    prompt_tokens_per_query: float | None = None
    cached_tokens_per_query: float | None = None
    computed_tokens_per_query: float | None = None
    wasted_tokens_per_query: float | None = None
    decode_step_ms: float | None = None
    gain_p50: float | None = None
    gain_p95: float | None = None
    gain_p99: float | None = None
    new_gain_p50: float | None = None
    speculative_hits_new: Hits | None = None
    max_cache_bytes: int | None = None
    others_cpu_percent: float | None = None


class Goal(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A figure with its bound. ``value`` and ``reached`` are None if it was not measured."""

    name: str
    value: float | None
    reached: bool | None
    at_most: float | None = None
    at_least: float | None = None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that was measured; what has not been is None."""

    machine: dict[str, Any]
    rows: list[Row]
    restore_200_tokens_ms: float | None
    hit_p50_ms: float | None
    hit_p99_ms: float | None
    preemption_p99_ms: float | None
    rss_growth: float | None
    goals: list[Goal]


def make_report(
    machine: dict[str, Any], runs: Sequence[ModeRun], extras: Extras, restore_200_tokens_ms: float | None
) -> Report:
    """Rows and goals from the runs of each mode."""
    plain = {run.mode: make_row(run) for run in runs}
    base = plain.get(_BASE_MODE)
    rows = [_with_gains(row, base) if row.mode in _GAINING_MODES and base else row for row in plain.values()]
    speculative = next((run for run in runs if run.mode == "speculative"), None)
    in_trace = speculative.samples if speculative is not None else []
    hits_ms = extras.hits_ms + [
        sample.first_ms for sample in in_trace if sample.asked_before and sample.source in HIT_SOURCES
    ]
    figures = {
        "restore_200_tokens_ms": _rounded(restore_200_tokens_ms),
        "hit_p50_ms": _percentile(hits_ms, 50),
        "hit_p99_ms": _percentile(hits_ms, 99),
        "preemption_p99_ms": _rounded(extras.preemption_p99_ms),
        "rss_growth": _rounded(extras.rss_growth, 4),
    }
    return Report(machine=machine, rows=rows, goals=judge(plain, figures), **figures)


def make_row(run: ModeRun) -> Row:
    """One run's figures."""
    samples = run.samples
    if run.status != "ok" or not samples:
        return Row(mode=run.mode, status=run.status, queries=0)
    first = [sample.first_ms for sample in samples]
    new = [sample.first_ms for sample in samples if not sample.asked_before]
    repeated = [sample.first_ms for sample in samples if sample.asked_before]
    served = [sample for sample in samples if sample.source is not None]
    ahead = [sample.first_ms for sample in served if sample.source == "prefetch" and not sample.asked_before]
    count = len(samples)
    return Row(
        mode=run.mode,
        status=run.status,
        queries=count,
        **{f"p{percent}_ms": _percentile(first, percent) for percent in PERCENTILES},
        new_queries=len(new),
        **{f"new_p{percent}_ms": _percentile(new, percent) for percent in PERCENTILES},
        repeated_p50_ms=_percentile(repeated, 50),
        repeated_p99_ms=_percentile(repeated, 99),
        sources=_shares([sample.source for sample in served]),
        cached_from=_shares([sample.cached_from for sample in served]),
        prompt_tokens_per_query=round(sum(sample.prompt_tokens for sample in samples) / count, 1),
        cached_tokens_per_query=round(sum(sample.cached_tokens for sample in samples) / count, 1),
        computed_tokens_per_query=_per_query(run.computed_tokens, count),
        wasted_tokens_per_query=_per_query(run.wasted_tokens, count),
        decode_step_ms=_percentile([sample.decode_ms for sample in samples if sample.decode_ms is not None], 50),
        speculative_hits_new=(
            Hits(count=len(ahead), p50_ms=_percentile(ahead, 50), p99_ms=_percentile(ahead, 99))
            if run.mode == "speculative"
            else None
        ),
        max_cache_bytes=run.max_cache_bytes,
        others_cpu_percent=None if run.others_cpu is None else round(100 * run.others_cpu, 1),
    )


def judge(rows: dict[str, Row], figures: dict[str, float | None]) -> list[Goal]:
    """Every goal with its outcome."""

    def figure(mode: str, name: str) -> float | None:
        row = rows.get(mode)
        value: float | None = None if row is None else getattr(row, name)
        return value

    step_ms = figure("cold", "decode_step_ms")
    held = [row.max_cache_bytes for row in rows.values() if row.max_cache_bytes is not None]
    peer = f"{PEER}+partials"
    return [
        _at_most("restore_200_tokens_ms", figures["restore_200_tokens_ms"], 3.0),
        _at_least("cold_p50_over_prefix_p50", _ratio(figure("cold", "p50_ms"), figure("prefix", "p50_ms")), 3.0),
        _at_most(
            "partials_new_p50_ms",
            figure("partials", "new_p50_ms"),
            None if step_ms is None else round(2 * step_ms + 5, 2),
        ),
        _at_most("hit_p50_ms", figures["hit_p50_ms"], 3.0),
        _at_most("hit_p99_ms", figures["hit_p99_ms"], 10.0),
        _at_most("preemption_p99_ms", figures["preemption_p99_ms"], 30.0),
        *(
            _at_least(
                f"{peer}_p{percent}_over_partials_p{percent}",
                _ratio(figure(peer, f"p{percent}_ms"), figure("partials", f"p{percent}_ms")),
                1.0,
            )
            for percent in (50, 95)
        ),
        _at_most("rss_growth", figures["rss_growth"], 0.02),
        _at_most("prefix_cache_bytes", max(held, default=None), MAX_CACHE_BYTES),
    ]


def format_progress(run: ModeRun) -> str:
    """One line for a mode that has just ended, so that a run which is cut short was not for nothing."""
    row = make_row(run)
    if row.status != "ok":
        return f"{row.mode}: {row.status}"
    times = ", ".join(f"p{percent} {_shown(getattr(row, f'p{percent}_ms'))}" for percent in PERCENTILES)
    return (
        f"{row.mode}: {times} ms; new p50 {_shown(row.new_p50_ms)} ms; others took {_shown(row.others_cpu_percent)} %"
    )


def format_report(report: Report) -> str:
    """The report as a table for people, losing rows included."""
    run = report.machine["run"]
    lines = [
        format_machine(report.machine),
        f"{run['bundle']}, context {run['context']}, system prompt of {run['system_tokens']} tokens, "
        f"{run['queries']} queries, at most {run['max_tokens']} tokens an answer",
        f"{run['broker']} on 127.0.0.1 with TCP_NODELAY; words in "
        + ("real time" if run["speed"] == 1 else f"{run['speed']:g} times real time: gaps are shorter than in speech"),
        "end of speech to first text, ms; new: never asked before by this user",
        "",
        f"{'mode':20} {'p50':>7} {'p95':>7} {'p99':>7} {'new p50':>8} {'p95':>7} {'p99':>7} {'again p50':>9} "
        f"{'cached':>12} {'wasted':>7} {'x prefix':>8} {'new':>6} {'others':>7}",
        f"{'':20} {'':>7} {'':>7} {'':>7} {'':>8} {'':>7} {'':>7} {'':>9} "
        f"{'tokens/query':>12} {'/query':>7} {'p50':>8} {'p50':>6} {'CPU %':>7}",
    ]
    for row in report.rows:
        if row.status != "ok":
            lines.append(f"{row.mode:20} {row.status}")
            continue
        cached = f"{_shown(row.cached_tokens_per_query)}/{_shown(row.prompt_tokens_per_query)}"
        lines.append(
            f"{row.mode:20} {_shown(row.p50_ms):>7} {_shown(row.p95_ms):>7} {_shown(row.p99_ms):>7} "
            f"{_shown(row.new_p50_ms):>8} {_shown(row.new_p95_ms):>7} {_shown(row.new_p99_ms):>7} "
            f"{_shown(row.repeated_p50_ms):>9} {cached:>12} {_shown(row.wasted_tokens_per_query):>7} "
            f"{_shown(row.gain_p50, 2):>8} {_shown(row.new_gain_p50, 2):>6} {_shown(row.others_cpu_percent):>7}"
        )
        if (hits := row.speculative_hits_new) is not None:
            lines.append(
                f"{'  answered ahead, new':20} {'':>7} {'':>7} {'':>7} "
                f"{_shown(hits.p50_ms):>8} {'':>7} {_shown(hits.p99_ms):>7}   {hits.count} of {row.new_queries}"
            )
    lines.append("")
    for row in report.rows:
        if row.sources:
            lines.append(f"{row.mode:12} answers from {_listed(row.sources)}; prompts from {_listed(row.cached_from)}")
    if (tokens := run.get("pair_prefetched_tokens")) is not None:
        lines.append(f"in the pairs with and without prefetch, {tokens} tokens were prefetched")
    if (quarters := run.get("rss_quarters_mb")) is not None:
        lines.append(
            f"anonymous memory {quarters[0]:.1f} MB in the soak's first quarter, {quarters[1]:.1f} MB in its last"
        )
    lines.append("")
    lines += [_goal_line(goal) for goal in report.goals]
    return "\n".join(lines)


def _with_gains(row: Row, base: Row) -> Row:
    names = {"gain_p50": "p50_ms", "gain_p95": "p95_ms", "gain_p99": "p99_ms", "new_gain_p50": "new_p50_ms"}
    gains = {gain: _ratio(getattr(base, name), getattr(row, name)) for gain, name in names.items()}
    return msgspec.structs.replace(row, **gains)


def _goal_line(goal: Goal) -> str:
    verdict = {True: "reached", False: "MISSED", None: "not measured"}[goal.reached]
    bound = "the bound comes from the mode cold"
    if goal.at_most is not None:
        bound = f"at most {goal.at_most:.12g}"
    elif goal.at_least is not None:
        bound = f"at least {goal.at_least:g}"
    shown = "" if goal.value is None else f" {goal.value:.12g},"
    return f"{verdict:13} {goal.name}{shown} {bound}"


def _at_most(name: str, value: float | None, bound: float | None) -> Goal:
    reached = None if value is None or bound is None else value <= bound
    return Goal(name=name, value=value, reached=reached, at_most=bound)


def _at_least(name: str, value: float | None, bound: float) -> Goal:
    return Goal(name=name, value=value, reached=None if value is None else value >= bound, at_least=bound)


def _percentile(values: Sequence[float], percent: float) -> float | None:
    return round(percentile(values, percent), 2) if values else None


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else round(above / below, 2)


def _rounded(value: float | None, digits: int = 2) -> float | None:
    return None if value is None else round(value, digits)


def _per_query(tokens: int | None, count: int) -> float | None:
    return None if tokens is None else round(tokens / count, 1)


def _shares(values: Sequence[str | None]) -> dict[str, float]:
    return {value or "none": round(number / len(values), 3) for value, number in Counter(values).most_common()}


def _listed(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items())


def _shown(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
