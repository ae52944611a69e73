"""The modes: which caches are on, the trace in each of them, and what is measured on top in the last one."""

from __future__ import annotations

import random
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from benchmarks.process import memory
from benchmarks.ratios import percentile
from benchmarks.serving import ServingError
from benchmarks.voice.client import METRICS_INTERVAL_S, OthersShare, Sample, replay, serving, to_sample
from benchmarks.voice.trace import SEED, fresh_queries, repeats
from benchmarks.voice.words import SYSTEM_PROMPT

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from benchmarks.serving import Daemon
    from benchmarks.voice.client import VoiceClient
    from benchmarks.voice.prompts import Prompts
    from benchmarks.voice.trace import Utterance
    from edge_llm.bundle.manifest import Bundle

MAX_TOKENS: Final = 24
MAX_CACHE_BYTES: Final = 128 << 20
HIT_SOURCES: Final = ("response_cache", "prefetch")
_SWITCHES: Final = (
    "cache.prefix",
    "cache.snapshots",
    "cache.responses",
    "prefetch.partials",
    "prefetch.speculation",
    "prefetch.popularity",
)
# Mode → which switches are on.
OWN_MODES: Final = {
    "cold": _SWITCHES[:0],
    "prefix": _SWITCHES[:2],
    "partials": ("cache.prefix", "cache.snapshots", "prefetch.partials"),
    "speculative": _SWITCHES,
}
LISTENING_MODES: Final = ("partials", "speculative", "llama.cpp+partials")
WARM_UPS: Final = 3
WARM_UP_TEXT: Final = "Please say something to begin with."
_HIT_PAUSE_S: Final = 0.02
_SOAK_TOKENS: Final = 4
# Pairs are told apart by the prefetch alone: their queries are equally long.
_PAIR_WORDS: Final = 9
_PAIR_PAUSE_S: Final = 0.5
_PREFETCHED_QUERIES: Final = 5
_MAX_OFFSET_S: Final = 0.1


@dataclass
class ModeRun:
    """What one mode has shown.

    Attributes:
        status: "ok", or why there is no row.
        computed_tokens, wasted_tokens: by prefetch, over the whole trace; None if the daemon does not count them.
        others_cpu: share of the busy time that other processes took.
        max_cache_bytes: the most that the prefix cache has held; None if the daemon does not say.
    """

    mode: str
    status: str = "ok"
    samples: list[Sample] = field(default_factory=list)
    computed_tokens: int | None = None
    wasted_tokens: int | None = None
    others_cpu: float | None = None
    max_cache_bytes: int | None = None


@dataclass
class Extras:
    """What is measured beside the trace, in the mode with everything on.

    Attributes:
        hits_ms: of queries that had been asked before, whose answers were ready.
        alone_ms, disturbed_ms: a never-asked query without and with another user's prefetch going on; pair by pair.
        pair_prefetched_tokens: what prefetch computed in the pairs; None if the daemon does not count it.
        rss_mb: anonymous memory of the daemon, after each query of the soak.
    """

    hits_ms: list[float] = field(default_factory=list)
    alone_ms: list[float] = field(default_factory=list)
    disturbed_ms: list[float] = field(default_factory=list)
    pair_prefetched_tokens: int | None = None
    rss_mb: list[float] = field(default_factory=list)

    @property
    def preemption_p99_ms(self) -> float | None:
        """How much later a query's first text comes at the 99th percentile when it interrupts prefetch."""
        if not self.alone_ms:
            return None
        return percentile(self.disturbed_ms, 99) - percentile(self.alone_ms, 99)

    @property
    def rss_quarters_mb(self) -> tuple[float, float] | None:
        """Means of the first and of the last quarter of the soak."""
        quarter = len(self.rss_mb) // 4
        if not quarter:
            return None
        return sum(self.rss_mb[:quarter]) / quarter, sum(self.rss_mb[-quarter:]) / quarter

    @property
    def rss_growth(self) -> float | None:
        """The last quarter over the first, minus 1."""
        if self.rss_quarters_mb is None:
            return None
        first, last = self.rss_quarters_mb
        return last / first - 1


@dataclass(frozen=True)
class Amounts:
    """How much is measured."""

    speed: float
    hits: int
    pairs: int
    soak: int


def settings_of(mode: str) -> dict[str, Any]:
    """Settings of the daemon. Answers are short: what counts is when they begin."""
    on = OWN_MODES[mode]
    return {
        "serving.system_prompt": SYSTEM_PROMPT,
        "serving.max_tokens": MAX_TOKENS,
        "serving.metrics_interval_s": METRICS_INTERVAL_S,
        "cache.max_bytes": MAX_CACHE_BYTES,
        # Terminal events are kept for repeated ids this long: over a soak of some minutes it would look like a leak.
        "serving.dedupe_window_s": 10.0,
        **{switch: switch in on for switch in _SWITCHES},
    }


def run_mode(
    mode: str,
    bundle: Bundle,
    prepared_dir: Path,
    prompts: Prompts,
    trace: Sequence[Utterance],
    amounts: Amounts,
) -> tuple[ModeRun, Extras]:
    """The trace through a fresh daemon, then the extras if everything is on.

    A daemon that fails costs what was not measured yet: the run's ``status`` says why, or a line on standard error if
    the trace had been measured.
    """
    run, extras = ModeRun(mode), Extras()
    try:
        with serving(bundle, prepared_dir, settings_of(mode)) as (daemon, client, _):
            try:
                _warm_up(client, daemon, prompts)
                run_trace(client, daemon, trace, amounts.speed, run)
                if mode == "speculative":
                    run_extras(client, daemon, trace, amounts, extras)
            finally:
                run.max_cache_bytes = client.max_cache_bytes
    except (ServingError, OSError) as error:  # memory of a process that is gone is an OSError
        if len(run.samples) < len(trace):
            run.status = f"failed: {error}"
        print(f"benchmarks.voice: {mode}: {error}", file=sys.stderr)
    return run, extras


def run_trace(client: VoiceClient, daemon: Daemon, trace: Sequence[Utterance], speed: float, run: ModeRun) -> None:
    """Say the whole trace; the next utterance begins when the last one has been answered."""
    before = client.next_metrics(daemon)
    others = OthersShare()
    for utterance in progress(run.mode, trace):
        run.samples.append(replay(client, daemon, utterance, speed, listened=run.mode in LISTENING_MODES))
    run.others_cpu = others.share()
    after = client.next_metrics(daemon)
    run.computed_tokens = counted("prefetch_tokens_computed", before, after)
    run.wasted_tokens = counted("prefetch_tokens_wasted", before, after)


def run_extras(
    client: VoiceClient, daemon: Daemon, trace: Sequence[Utterance], amounts: Amounts, extras: Extras
) -> None:
    """Hits, preemption, then the soak."""
    rng = random.Random(SEED + 1)
    extras.hits_ms += measure_hits(client, daemon, repeats(rng, trace), amounts.hits)
    fresh = fresh_queries(rng, trace)
    before = client.next_metrics(daemon)
    _measure_preemption(client, daemon, fresh, rng, amounts.pairs, extras)
    extras.pair_prefetched_tokens = counted("prefetch_tokens_computed", before, client.next_metrics(daemon))
    _soak(client, daemon, fresh, repeats(rng, trace), amounts.soak, extras)


def measure_hits(client: VoiceClient, daemon: Daemon, repeated: Iterator[tuple[str, str]], count: int) -> list[float]:
    """First-text times of repeated queries whose answers were ready."""
    hits = []
    for number in progress("hits", range(count)):
        user, text = next(repeated)
        sample = to_sample(client.ask_as(daemon, user, {"id": f"hit-{number}", "text": text}), asked_before=True)
        if sample.source in HIT_SOURCES:
            hits.append(sample.first_ms)
        time.sleep(_HIT_PAUSE_S)
    return hits


def _measure_preemption(
    client: VoiceClient,
    daemon: Daemon,
    fresh: Iterator[tuple[str, str]],
    rng: random.Random,
    pairs: int,
    extras: Extras,
) -> None:
    def ask(name: str) -> float:
        text = next(text for _, text in fresh if len(text.split()) == _PAIR_WORDS)
        answer = client.ask_as(daemon, "guest", {"id": name, "text": text})
        return to_sample(answer, asked_before=False).first_ms

    def ask_disturbed(number: int) -> float:
        words = " ".join(next(fresh)[1].rstrip("?") for _ in range(_PREFETCHED_QUERIES))
        client.publish_partial("talker", f"pair-{number}", 0, words)
        time.sleep(rng.uniform(0, _MAX_OFFSET_S))
        return ask(f"disturbed-{number}")

    for number in progress("preemption", range(pairs)):
        alone_first = rng.random() < 0.5
        if alone_first:
            extras.alone_ms.append(ask(f"alone-{number}"))
            time.sleep(_PAIR_PAUSE_S)
        extras.disturbed_ms.append(ask_disturbed(number))
        time.sleep(_PAIR_PAUSE_S)  # the rest of the prefetch
        if not alone_first:
            extras.alone_ms.append(ask(f"alone-{number}"))
            time.sleep(_PAIR_PAUSE_S)


def _soak(
    client: VoiceClient,
    daemon: Daemon,
    fresh: Iterator[tuple[str, str]],
    repeated: Iterator[tuple[str, str]],
    count: int,
    extras: Extras,
) -> None:
    """Short queries without a pause, three of ten repeated, half of them after a partial.

    A cache that fills up to its bound is no leak: it is filled before, with at most a quarter as many queries.
    """

    def ask(name: str, number: int) -> None:
        user, text = next(repeated if number % 10 in (3, 6, 9) else fresh)
        query: dict[str, Any] = {"id": f"{name}-{number}", "text": text, "max_tokens": _SOAK_TOKENS}
        if number % 2:
            words = text.split()
            client.publish_partial(user, query["id"], 0, " ".join(words[: len(words) // 2]))
            query["utterance"] = query["id"]
        client.ask_as(daemon, user, query)

    for number in range(count // 4):
        ask("fill", number)
        if client.metrics.get("gauges", {}).get("prefix_cache_evicted"):
            break
    for number in progress("soak", range(count)):
        ask("soak", number)
        extras.rss_mb.append(memory(daemon.pid).rss_anon_mb)


def counted(name: str, before: dict[str, Any], after: dict[str, Any]) -> int | None:
    """How much a counter of the metrics has grown; None if there is none. A counter appears when it first counts."""
    if name not in after.get("counters", {}):
        return None
    return int(after["counters"][name]) - int(before.get("counters", {}).get(name, 0))


def _warm_up(client: VoiceClient, daemon: Daemon, prompts: Prompts) -> None:
    """A few queries that no cache remembers. Raises ``ServingError`` if the daemon's prompts are not the peer's."""
    for number in range(WARM_UPS):
        query = {"id": f"warm-up-{number}", "text": WARM_UP_TEXT, "cache": "bypass"}
        tokens = to_sample(client.ask_as(daemon, "nobody", query), asked_before=False).prompt_tokens
        if tokens != len(prompts.query(WARM_UP_TEXT)):
            raise ServingError(f"the daemon's prompt has {tokens} tokens, not {len(prompts.query(WARM_UP_TEXT))}")


def progress(what: str, items: Sequence[Any]) -> Iterator[Any]:
    """The items, with a line on standard error that says how far it is."""
    started_at = time.monotonic()
    on_terminal = sys.stderr.isatty()
    step = 1 if on_terminal else max(1, len(items) // 10)
    for number, item in enumerate(items, 1):
        yield item
        if number % step == 0 or number == len(items):
            line = f"{what}: {number} of {len(items)}, {time.monotonic() - started_at:.0f} s"
            ends = "\n" if number == len(items) or not on_terminal else ""
            print(f"\r{line}" if on_terminal else line, end=ends, file=sys.stderr, flush=True)
