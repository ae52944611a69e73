"""Comparing engines round by round, and the goals that the comparison has to reach."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Literal

import msgspec

Metric = Literal["prefill_64_ms", "decode_ms"]


class Ratio(msgspec.Struct, frozen=True, kw_only=True):
    """How many times longer a peer takes, per round: the median and the 10th percentile over the rounds."""

    model: str
    peer: str
    metric: Metric
    median: float
    p10: float


class Goal(msgspec.Struct, frozen=True, kw_only=True):
    """A median ratio to reach. ``reached`` is None if the peer was not measured."""

    model: str
    peer: str
    metric: Metric
    at_least: float
    median: float | None = None
    reached: bool | None = None


GOALS: Final = (
    Goal(model="gpt2-124m", peer="ctranslate2", metric="decode_ms", at_least=2.5),
    Goal(model="gpt2-124m", peer="optimum-onnx", metric="decode_ms", at_least=3.5),
    Goal(model="smollm2-135m", peer="llama.cpp", metric="decode_ms", at_least=1.1),
    Goal(model="smollm2-135m", peer="llama.cpp", metric="prefill_64_ms", at_least=1.5),
)


def percentile(values: Sequence[float], percent: float) -> float:
    """The ``percent``-th percentile, linear between the two nearest values (numpy's default).

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def median(values: Sequence[float]) -> float:
    """The 50th percentile."""
    return percentile(values, 50)


def compare(model: str, peer: str, metric: Metric, peer_ms: Sequence[float], own_ms: Sequence[float]) -> Ratio:
    """The ratio of a peer's times to this runtime's, one pair a round.

    Raises:
        ValueError: not as many of one as of the other, or none.
    """
    ratios = [theirs / ours for theirs, ours in zip(peer_ms, own_ms, strict=True)]
    return Ratio(
        model=model,
        peer=peer,
        metric=metric,
        median=round(median(ratios), 2),
        p10=round(percentile(ratios, 10), 2),
    )


def judge(goal: Goal, ratios: Sequence[Ratio]) -> list[Goal]:
    """The goal with its outcome, once for every way in which the peer was run ("llama.cpp", "llama.cpp …")."""
    outcomes = [
        msgspec.structs.replace(goal, peer=ratio.peer, median=ratio.median, reached=ratio.median >= goal.at_least)
        for ratio in ratios
        if (ratio.model, ratio.metric) == (goal.model, goal.metric)
        and (ratio.peer == goal.peer or ratio.peer.startswith(goal.peer + " "))
    ]
    return outcomes or [goal]
