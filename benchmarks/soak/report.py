"""From records to figures, and from figures to a verdict."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec
import numpy as np

from benchmarks.machine import format_machine
from benchmarks.ratios import percentile
from benchmarks.soak.acts import PLAIN_KINDS
from benchmarks.soak.records import Again, Counts, Done, End, Lost, Record, RecordError, Restart, Sample, Start

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

RecordT = TypeVar("RecordT", bound=Record)

# After the first answer that follows a restart: what had waited is worked off, and clients come back.
SETTLE_S: Final = 10.0
QUERIES_A_DAY: Final = 1000
BOUNDS: Final = {
    "rss_slope_mb_per_h": 0.5,
    "lost": 0.0,
    "doubled": 0.0,
    "p99_last_over_first": 1.2,
    "written_mb_a_day": 50.0,
}
_TENTHS: Final = 10
_EXAMPLES: Final = 20
# The 99th percentile of fewer is their maximum.
MIN_QUERIES: Final = 100


class Bound(msgspec.Struct, frozen=True, kw_only=True):
    """A figure that must not be exceeded. ``value`` and ``reached`` are None where the run does not say."""

    name: str
    at_most: float
    value: float | None
    reached: bool | None


class Slope(msgspec.Struct, frozen=True, kw_only=True):
    """A least-squares line: what it rises in an hour, with its standard error, from ``samples`` samples."""

    per_hour: float
    standard_error: float | None
    samples: int


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Of the plain queries that were sent in one tenth of the run and met no restart of the broker, in milliseconds.

    ``others_cpu``: the mean share of the busy processor time that other programs took meanwhile.
    """

    queries: int
    first_text_p50: float
    first_text_p99: float
    answer_p50: float
    answer_p99: float
    others_cpu: float | None


class Range(msgspec.Struct, frozen=True, kw_only=True):
    """A quantity after the warm-up, at the end, and at its highest in between."""

    first: float
    last: float
    most: float


class SoakReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured; ``docs/benchmarks.md`` defines each figure.

    ``doubled`` counts second terminal events that differ from the first, and identical ones that nothing explains.
    ``repeated_on_request`` are those that the contract allows because the query was published again (the same event,
    or the other outcome if one of the two is a refusal that may be retried), ``repeated_at_restart`` the identical ones
    that came over a new connection. ``tenths`` has None where nothing was measured, ``written_mb`` is None where Linux
    does not count it.
    """

    machine: dict[str, Any]
    bundle: str
    broker: str
    minutes: float
    warm_up_minutes: float
    queries_per_second: float
    users: int
    complete: bool
    counts: dict[str, int]
    outcomes: dict[str, dict[str, int]]
    finals: int
    restarts_s: list[float]
    rss_slope: Slope | None
    rss_anon_mb: Range
    rss_file_mb: Range
    descriptors: Range
    threads: Range
    gauges: dict[str, list[float | None]]
    tenths: list[Latency | None]
    p99_last_over_first: float | None
    lost: int
    doubled: int
    repeated_on_request: int
    repeated_at_restart: int
    examples: list[dict[str, Any]]
    written_mb: float | None
    written_mb_a_day: float | None
    logged_mb: float | None
    daemon_counters: dict[str, int]
    bounds: list[Bound]


@dataclass(frozen=True)
class _Run:
    """The records of a run, sorted out. ``ended_at`` is the moment of the last one if it was cut short."""

    start: Start
    samples: list[Sample]
    restarts: list[Restart]
    queries: list[Done]
    agains: list[Again]
    losts: list[Lost]
    counts: dict[str, int]
    end: End | None
    ended_at: float

    def disturbed(self, since: float, until: float) -> bool:
        """Whether a restart of the broker, or what followed it, touches a time span."""
        return any(since <= restart.back_at + SETTLE_S and until >= restart.killed_at for restart in self.restarts)


def make_report(records: Iterable[Record]) -> SoakReport:
    """Figures and verdict from a run's records, also from one that was cut short.

    Raises:
        RecordError: the records do not say how the run began, or hold no sample.
    """
    run = _sort_out(records)
    start = run.start
    warm = [sample for sample in run.samples if sample.at >= start.at + 60 * start.warm_up_minutes] or run.samples[-1:]
    slope = rss_slope([sample.at for sample in warm], [sample.rss_anon_mb for sample in warm])
    finals = sum(query.outcome.startswith("final_") for query in run.queries)
    tenths = _tenths(run)
    ratio = _ratio(tenths[0], tenths[-1])
    doubled = [again for again in run.agains if not _explained(run, again)]
    on_request = sum(again.asked_for for again in run.agains if again not in doubled)
    written_mb, written_mb_a_day = _written(run)
    figures: dict[str, float | None] = {
        "rss_slope_mb_per_h": None if slope is None else slope.per_hour,
        "lost": float(len(run.losts)) if run.end is not None else None,
        "doubled": float(len(doubled)),
        "p99_last_over_first": ratio,
        "written_mb_a_day": written_mb_a_day,
    }
    return SoakReport(
        machine=start.machine,
        bundle=start.bundle,
        broker=start.broker,
        minutes=round((run.ended_at - start.at) / 60, 2),
        warm_up_minutes=start.warm_up_minutes,
        queries_per_second=start.queries_per_second,
        users=start.users,
        complete=run.end is not None,
        counts=dict(sorted(run.counts.items())),
        outcomes=_outcomes(run.queries),
        finals=finals,
        restarts_s=[round(restart.back_at - restart.killed_at, 2) for restart in run.restarts],
        rss_slope=slope,
        rss_anon_mb=_range([sample.rss_anon_mb for sample in warm]),
        rss_file_mb=_range([sample.rss_file_mb for sample in warm]),
        descriptors=_range([sample.descriptors for sample in warm]),
        threads=_range([sample.threads for sample in warm]),
        gauges={name: [warm[0].gauges.get(name), value] for name, value in sorted(warm[-1].gauges.items())},
        tenths=tenths,
        p99_last_over_first=ratio,
        lost=len(run.losts),
        doubled=len(doubled),
        repeated_on_request=on_request,
        repeated_at_restart=len(run.agains) - len(doubled) - on_request,
        examples=[msgspec.to_builtins(record) for record in (*run.losts, *doubled)][:_EXAMPLES],
        written_mb=written_mb,
        written_mb_a_day=written_mb_a_day,
        logged_mb=None if run.end is None else round(run.end.log_bytes / 1e6, 3),
        daemon_counters={} if run.end is None else run.end.counters,
        bounds=[_judge(name, at_most, figures[name]) for name, at_most in BOUNDS.items()],
    )


def rss_slope(at_s: Sequence[float], mb: Sequence[float]) -> Slope | None:
    """The least-squares line through memory over time; None with fewer than three samples, or all at one moment.

    Neighbouring samples of a process's memory are nearly the same, so they say less than as many independent ones: the
    standard error counts n (1 - r) / (1 + r) of them, r being the residuals' lag-1 autocorrelation (Santer et al. 2000,
    "Statistical significance of trends and trend differences", J. Geophys. Res. 105, eqs. 3 to 6). None if that leaves
    no more than two.
    """
    if len(at_s) < 3:
        return None
    hours = (np.asarray(at_s, np.float64) - np.mean(at_s)) / 3600
    values = np.asarray(mb, np.float64) - np.mean(mb)
    spread = float((hours**2).sum())
    if spread == 0.0:
        return None
    per_hour = float((hours * values).sum()) / spread
    residuals = values - per_hour * hours
    squares = float((residuals**2).sum())
    correlation = float((residuals[1:] * residuals[:-1]).sum()) / squares if squares > 0 else 0.0
    correlation = min(max(correlation, 0.0), 1.0)
    effective = len(hours) * (1 - correlation) / (1 + correlation)
    error = round(float(np.sqrt(squares / (effective - 2) / spread)), 3) if effective > 2 else None
    return Slope(per_hour=round(per_hour, 3), standard_error=error, samples=len(hours))


def _sort_out(records: Iterable[Record]) -> _Run:
    found = list(records)

    def of(kind: type[RecordT]) -> list[RecordT]:
        return [record for record in found if isinstance(record, kind)]

    starts, samples, ends = of(Start), of(Sample), of(End)
    if not starts or not samples:
        raise RecordError("the records hold no start, or no sample: the run ended before anything was measured")
    latest = {record.process: record.counts for record in of(Counts)}
    total: Counter[str] = Counter()
    for counts in latest.values():
        total.update(counts)
    end = ends[-1] if ends else None
    ended_at = samples[-1].at if end is None else end.at
    return _Run(starts[-1], samples, of(Restart), of(Done), of(Again), of(Lost), dict(total), end, ended_at)


def _tenths(run: _Run) -> list[Latency | None]:
    length_s = max((run.ended_at - run.start.at) / _TENTHS, 1e-9)

    def tenth(at: float) -> int:
        return min(_TENTHS - 1, max(0, int((at - run.start.at) / length_s)))

    queries: list[list[Done]] = [[] for _ in range(_TENTHS)]
    for query in run.queries:
        plain = query.kind in PLAIN_KINDS and query.outcome in ("final_stop", "final_length")
        if plain and not run.disturbed(query.sent_at, query.sent_at + query.answer_ms / 1e3):
            queries[tenth(query.sent_at)].append(query)
    others: list[list[float]] = [[] for _ in range(_TENTHS)]
    for sample in run.samples:
        others[tenth(sample.at)].append(sample.others_cpu)
    return [_latency(mine, shares) for mine, shares in zip(queries, others, strict=True)]


def _latency(queries: Sequence[Done], others: Sequence[float]) -> Latency | None:
    if not queries:
        return None
    first, answer = [query.first_ms for query in queries], [query.answer_ms for query in queries]
    return Latency(
        queries=len(queries),
        first_text_p50=round(percentile(first, 50), 2),
        first_text_p99=round(percentile(first, 99), 2),
        answer_p50=round(percentile(answer, 50), 2),
        answer_p99=round(percentile(answer, 99), 2),
        others_cpu=round(sum(others) / len(others), 3) if others else None,
    )


def _ratio(first: Latency | None, last: Latency | None) -> float | None:
    """How many times slower the slow answers are in the last tenth; None if one of the two has too few for a p99."""
    if first is None or last is None or min(first.queries, last.queries) < MIN_QUERIES:
        return None
    return round(last.answer_p99 / first.answer_p99, 3)


def _explained(run: _Run, again: Again) -> bool:
    """Whether the contract allows it: the answer to a copy, or the same event sent again over a new connection."""
    if again.asked_for:
        return again.same or again.refused
    return again.same and run.disturbed(again.at, again.at)


def _written(run: _Run) -> tuple[float | None, float | None]:
    """Megabytes written between the first sample and the last, and what a day of ``QUERIES_A_DAY`` finals would be."""
    if not run.start.counts_writes:
        return None, None
    first, last = run.samples[0], run.samples[-1]
    written = (last.written_bytes - first.written_bytes) / 1e6
    finals = sum(
        query.outcome.startswith("final_") and first.at <= query.sent_at + query.answer_ms / 1e3 <= last.at
        for query in run.queries
    )
    return round(written, 3), round(written / finals * QUERIES_A_DAY, 2) if finals else None


def _outcomes(queries: Sequence[Done]) -> dict[str, dict[str, int]]:
    table: dict[str, Counter[str]] = {}
    for query in queries:
        table.setdefault(query.kind, Counter())[query.outcome] += 1
    return {kind: dict(sorted(counts.items())) for kind, counts in sorted(table.items())}


def _range(values: Sequence[float]) -> Range:
    return Range(first=values[0], last=values[-1], most=max(values))


def _judge(name: str, at_most: float, value: float | None) -> Bound:
    return Bound(name=name, at_most=at_most, value=value, reached=None if value is None else value <= at_most)


def format_report(report: SoakReport) -> str:
    """The report as lines for people."""
    lines = [
        format_machine(report.machine),
        f"{report.bundle}, {report.broker} with examples/mosquitto, {report.users} users, "
        f"{report.queries_per_second:g} queries/s, {report.minutes:g} minutes, "
        f"warm-up {report.warm_up_minutes:g}{'' if report.complete else ', CUT SHORT'}",
        "",
        _format_slope(report.rss_slope),
    ]
    ranges = {
        "anonymous memory, MB": report.rss_anon_mb,
        "file-backed memory, MB": report.rss_file_mb,
        "file descriptors": report.descriptors,
        "threads": report.threads,
    }
    lines.append(f"{'after the warm-up':24}{'first':>10}{'last':>10}{'most':>10}")
    lines += [f"{label:24}{r.first:>10g}{r.last:>10g}{r.most:>10g}" for label, r in ranges.items()]
    lines += [f"  {name:22}{_shown(first):>10}{_shown(last):>10}" for name, (first, last) in report.gauges.items()]
    lines += [
        "",
        "latency by tenth of the run, ms; plain queries away from broker restarts; last column: other programs' CPU",
        f"{'':6}{'queries':>9}{'first p50':>11}{'p99':>9}{'answer p50':>12}{'p99':>9}{'others':>9}",
    ]
    for number, latency in enumerate(report.tenths, 1):
        lines.append(f"{number:<6}{_format_latency(latency)}")
    restarts = ", ".join(f"{seconds:.1f}" for seconds in report.restarts_s)
    lines += [
        "",
        f"finals {report.finals}; broker restarts {len(report.restarts_s)} ({restarts or 'none'} s without answers)",
        f"lost {report.lost}, doubled {report.doubled}; the same again on request {report.repeated_on_request}, "
        f"at a restart {report.repeated_at_restart}",
        f"written {_shown(report.written_mb)} MB, {_shown(report.written_mb_a_day)} MB a day at {QUERIES_A_DAY} finals"
        f" (logged {_shown(report.logged_mb)} MB of that)",
        "done: " + ", ".join(f"{name} {count}" for name, count in report.counts.items()),
        *(f"  {kind}: " + ", ".join(f"{name} {n}" for name, n in row.items()) for kind, row in report.outcomes.items()),
        *(f"  ! {example}" for example in report.examples),
        "",
    ]
    for bound in report.bounds:
        verdict = {True: "reached", False: "MISSED", None: "unknown"}[bound.reached]
        lines.append(f"{verdict:8} {bound.name} {_shown(bound.value)}, at most {bound.at_most:g}")
    return "\n".join(lines)


def _format_slope(slope: Slope | None) -> str:
    if slope is None:
        return "anonymous memory: too few samples after the warm-up for a slope"
    error = "unknown" if slope.standard_error is None else f"{slope.standard_error:.2f}"
    return f"anonymous memory rises {slope.per_hour:.2f} MB/h (standard error {error}, {slope.samples} samples)"


def _format_latency(latency: Latency | None) -> str:
    if latency is None:
        return f"{'nothing measured':>18}"
    return (
        f"{latency.queries:>9}{latency.first_text_p50:>11.1f}{latency.first_text_p99:>9.1f}"
        f"{latency.answer_p50:>12.1f}{latency.answer_p99:>9.1f}{_shown(latency.others_cpu):>9}"
    )


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"
