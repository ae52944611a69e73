"""Counting what a domain model did."""

from __future__ import annotations

import pytest

from benchmarks.domain.judging import Judged, at_thresholds, binomial_upper, figures_of
from benchmarks.domain.utterances import Utterance, WantedAction, read_utterances
from edge_llm.errors import EdgeLlmError

OPEN = WantedAction("window.move", {"which": "driver", "action": "open"})
GO = WantedAction("nav.go", {"destination": "Ulm"})


def judged(
    wanted: Utterance, kind: str, actions: tuple[WantedAction, ...] = (), confidences: tuple[float, ...] = ()
) -> Judged:
    return Judged(wanted, kind, actions, "Fine.", 0, confidences)


COMMAND = Utterance("open my window and go to Ulm", "command", (OPEN, GO), ("fine",))
OUTSIDE = Utterance("will it rain", "outside")
FACT = Utterance("what is a heat pump", "fact", (), ("moves heat",))
ALL = [
    judged(COMMAND, "command", (OPEN, WantedAction("nav.go", {"destination": "ulm "})), (0.9, 0.6)),
    judged(COMMAND, "command", (GO,), (0.4,)),
    judged(OUTSIDE, "refusal"),
    judged(OUTSIDE, "command", (OPEN,), (0.55,)),
    judged(FACT, "fact"),
    judged(FACT, "command", (OPEN,), (0.95,)),
]


def test_shares_are_of_what_they_concern():
    figures = figures_of(ALL)
    assert (figures.n, figures.action_exact, figures.answer_right) == (6, 0.5, 0.5)
    assert (figures.outside_refused, figures.outside_executed, figures.reply_executed) == (0.5, 0.5, 0.5)
    assert [failure["text"] for failure in figures.failures] == [
        COMMAND.text, OUTSIDE.text, FACT.text, FACT.text,
    ]  # fmt: skip
    nothing = figures_of([])
    assert (nothing.n, nothing.action_exact, nothing.outside_executed_upper_95) == (0, None, None)


def test_a_threshold_drops_what_is_less_sure():
    rows = {row["min_confidence"]: row for row in at_thresholds(ALL)}
    assert [rows[at]["action_exact"] for at in (0.0, 0.5, 0.7, 0.9)] == [0.5, 0.5, 0.0, 0.0]
    assert [rows[at]["outside_executed"] for at in (0.0, 0.5, 0.7)] == [0.5, 0.5, 0.0]
    assert [rows[at]["reply_executed"] for at in (0.0, 0.9)] == [0.5, 0.5]
    assert [rows[at]["wrong_action"] for at in (0.0, 0.9)] == [0.0, 0.0]
    wrong = [judged(COMMAND, "command", (WantedAction("nav.go", {"destination": "Bonn"}),), (0.8,))]
    assert [row["wrong_action"] for row in at_thresholds(wrong)] == [1.0, 1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("successes", "trials", "bound"), [(0, 100, 1 - 0.05 ** (1 / 100)), (9, 10, 0.95 ** (1 / 10)), (10, 10, 1.0)]
)
def test_the_upper_bound_is_that_of_clopper_and_pearson(successes, trials, bound):
    """Where it has a closed form: of none, and of all but one."""
    assert binomial_upper(successes, trials) == pytest.approx(bound, abs=1e-9)


def test_a_malformed_line_is_named(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"text": "a", "kind": "outside"}\n\n{"text": "b", "kind": "order"}\n')
    with pytest.raises(EdgeLlmError, match=r"lines\.jsonl:3: Invalid enum value 'order'"):
        read_utterances(path)
    path.write_text('{"text": "a", "kind": "command", "actions": [{"name": "trunk.open"}]}\n')
    assert read_utterances(path) == [Utterance("a", "command", (WantedAction("trunk.open"),))]
