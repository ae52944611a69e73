"""Whether what came out is what should have come out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import msgspec

from benchmarks.domain.utterances import Utterance, WantedAction
from edge_llm.engine.prompt import Message
from edge_llm.engine.sampler import SamplingParams
from export.console import progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edge_llm.domain.answer import DomainAnswer
    from edge_llm.domain.domain import Domain
    from edge_llm.engine.loading import LoadedModel

_MAX_TOKENS: Final = 160
_THRESHOLDS: Final = (0.0, 0.3, 0.5, 0.7, 0.9)


class Judged(msgspec.Struct, frozen=True):
    """An utterance and what came out; ``confidences`` has one for each action."""

    wanted: Utterance
    kind: str
    actions: tuple[WantedAction, ...]
    text: str
    dropped_actions: int
    confidences: tuple[float, ...] = ()

    @property
    def actions_exact(self) -> bool:
        """Names and all slots, in order; text slots compare without case."""
        return [_comparable(action) for action in self.actions] == [_comparable(a) for a in self.wanted.actions]

    @property
    def kind_right(self) -> bool:
        """A command whose number is out of range is refused, with the range."""
        expected = "refusal" if self.wanted.kind == "outside" else self.wanted.kind
        return self.kind == expected or (expected == "command" and not self.wanted.actions and self.kind == "refusal")

    @property
    def answer_right(self) -> bool:
        """Kind, and every keyword somewhere in the answer."""
        said = self.text.casefold()
        return self.kind_right and all(keyword.casefold() in said for keyword in self.wanted.answer_keywords)

    @property
    def wrong_actions(self) -> bool:
        """Whether something was done that was not asked for."""
        wanted = [_comparable(action) for action in self.wanted.actions]
        return any(_comparable(action) not in wanted for action in self.actions)

    def above(self, threshold: float) -> Judged:
        """What would have come out with the pack's ``min_confidence`` at ``threshold``."""
        kept = [index for index, confidence in enumerate(self.confidences) if confidence >= threshold]
        return msgspec.structs.replace(
            self,
            actions=tuple(self.actions[index] for index in kept),
            confidences=tuple(self.confidences[index] for index in kept),
        )


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Shares of the utterances that each concerns; None where there are none.

    ``outside_executed`` counts actions on what should have been refused, ``reply_executed`` on facts and small talk.
    """

    n: int
    action_exact: float | None
    answer_right: float | None
    outside_refused: float | None
    outside_executed: float | None
    outside_executed_upper_95: float | None
    reply_executed: float | None
    dropped_actions: int
    failures: list[dict[str, Any]]


def judge_all(model: LoadedModel, domain: Domain, utterances: Sequence[Utterance], description: str) -> list[Judged]:
    """Answer every utterance."""
    judged = []
    with progress(description, len(utterances), unit="utterance") as bar:
        for utterance in utterances:
            judged.append(judge(model, domain, utterance))
            bar.update()
    return judged


def judge(model: LoadedModel, domain: Domain, utterance: Utterance) -> Judged:
    """Answer one utterance from an empty cache, as the scheduler would."""
    engine = model.engine
    prompt_ids = model.renderer.encode([Message("user", utterance.text)])
    state = engine.start(prompt_ids, SamplingParams(), _MAX_TOKENS)
    answer: DomainAnswer = domain.answer(lambda: state.sampler, ())
    try:
        while not state.prefilled:
            engine.prefill(state)
        while not state.finished:
            engine.decode([state])
    finally:
        engine.release(state)
    answer.push(state.output_ids)
    answer.finish()
    actions = tuple(WantedAction(call.name, call.slots) for call in answer.actions)
    confidences = tuple(call.confidence for call in answer.actions)
    return Judged(utterance, answer.kind, actions, answer.text, answer.dropped_actions, confidences)


def figures_of(judged: Sequence[Judged]) -> Figures:
    """Count."""
    commands = [one for one in judged if one.wanted.kind == "command"]
    outside = [one for one in judged if one.wanted.kind == "outside"]
    answered = [one for one in judged if one.wanted.kind != "outside"]
    replies = [one for one in judged if one.wanted.kind in ("fact", "chat")]
    executed = sum(bool(one.actions) for one in outside)
    return Figures(
        n=len(judged),
        action_exact=share([one.actions_exact for one in commands]),
        answer_right=share([one.answer_right for one in answered]),
        outside_refused=share([one.kind_right and not one.actions for one in outside]),
        outside_executed=share([bool(one.actions) for one in outside]),
        outside_executed_upper_95=binomial_upper(executed, len(outside)) if outside else None,
        reply_executed=share([bool(one.actions) for one in replies]),
        dropped_actions=sum(one.dropped_actions for one in judged),
        failures=[_failure(one) for one in judged if not (one.actions_exact and one.answer_right)],
    )


def at_thresholds(judged: Sequence[Judged]) -> list[dict[str, float | None]]:
    """What ``min_confidence`` would buy, and what it would cost.

    Returns:
        For each threshold the shares of commands that are exact, of commands on which something else is done, and of
        outside utterances on which something is done.
    """
    rows = []
    for threshold in _THRESHOLDS:
        kept = [one.above(threshold) for one in judged]
        commands = [one for one in kept if one.wanted.kind == "command"]
        figures = figures_of(kept)
        rows.append(
            {
                "min_confidence": threshold,
                "action_exact": figures.action_exact,
                "wrong_action": share([one.wrong_actions for one in commands]),
                "outside_executed": figures.outside_executed,
                "reply_executed": figures.reply_executed,
            }
        )
    return rows


def binomial_upper(successes: int, trials: int, confidence: float = 0.95) -> float:
    """One-sided upper bound of a share (Clopper and Pearson 1934): the share that makes so few unlikely."""
    low, high = successes / trials, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        at_most = sum(math.comb(trials, k) * middle**k * (1 - middle) ** (trials - k) for k in range(successes + 1))
        low, high = (middle, high) if at_most > 1 - confidence else (low, middle)
    return high


def _comparable(action: WantedAction) -> tuple[str, dict[str, Any]]:
    return action.name, {
        name: value.casefold().strip() if isinstance(value, str) else float(value)
        for name, value in action.slots.items()
    }


def _failure(judged: Judged) -> dict[str, Any]:
    return {
        "text": judged.wanted.text,
        "kind": judged.wanted.kind,
        "wanted": [msgspec.to_builtins(action) for action in judged.wanted.actions] or judged.wanted.answer_keywords,
        "got": [judged.kind, [msgspec.to_builtins(action) for action in judged.actions], judged.text],
    }


def share(hits: Sequence[bool]) -> float | None:
    """Share of what is true; None of nothing."""
    return round(sum(hits) / len(hits), 5) if hits else None
