"""Which answers are kept for review."""

from __future__ import annotations

import pytest

from edge_llm.cache.feedback_log import FeedbackEntry
from edge_llm.domain.answer import ActionCall
from edge_llm.mqtt.feedback import FeedbackRecorder
from edge_llm.mqtt.messages import Feedback
from edge_llm.serving.request import Final, Timing, Usage

CALL = ActionCall(name="trunk.open", slots={}, confidence=0.9, confirm=True)


class Log:
    def __init__(self) -> None:
        self.entries: list[FeedbackEntry] = []

    def record(self, entry: FeedbackEntry) -> None:
        self.entries.append(entry)


@pytest.fixture
def log() -> Log:
    return Log()


def answer(**changes) -> Final:
    return Final(
        **{"text": "Done.", "finish_reason": "stop", "usage": Usage(), "timing": Timing(0, 0, None, 0)} | changes
    )


def test_refusals_and_lost_actions_are_kept_and_all_else_is_not(log):
    recorder = FeedbackRecorder(log)
    recorder.note_answer(("ann", "1"), "open it", answer(kind="command", actions=(CALL,)))
    recorder.note_answer(("ann", "2"), "is it wet", answer(kind="refusal"))
    recorder.note_answer(("ann", "3"), "open what", answer(kind="command", dropped_actions=1))
    recorder.note_answer(("ann", "4"), "is it", answer(kind="refusal", finish_reason="cancelled"))
    assert [(entry.reason, entry.text) for entry in log.entries] == [("refused", "is it wet"), ("failed", "open what")]


def test_a_rating_is_kept_with_what_it_is_about(log):
    recorder = FeedbackRecorder(log)
    recorder.note_answer(("ann", "1"), "open it", answer(kind="command", actions=(CALL,)))
    recorder.note_rating(("ann", "1"), Feedback(id="1", rating=-1, correction="the window"))
    recorder.note_rating(("bob", "1"), Feedback(id="1", rating=1))
    (entry,) = log.entries
    assert (entry.user, entry.reason, entry.rating, entry.correction) == ("ann", "rated", -1, "the window")
    assert '"trunk.open"' in entry.actions


def test_only_so_many_answers_wait_for_a_rating(log):
    recorder = FeedbackRecorder(log)
    for number in range(300):
        recorder.note_answer(("ann", str(number)), "hi", answer())
    recorder.note_rating(("ann", "0"), Feedback(id="0", rating=1))
    recorder.note_rating(("ann", "299"), Feedback(id="299", rating=1))
    assert len(log.entries) == 1
