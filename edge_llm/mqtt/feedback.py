"""From answers and ratings to the feedback log. Only when it is switched on; nothing leaves the device."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

import msgspec

from edge_llm.cache.feedback_log import FeedbackEntry

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge_llm.cache.feedback_log import FeedbackLog, Reason
    from edge_llm.mqtt.dedupe import Key
    from edge_llm.mqtt.messages import Feedback
    from edge_llm.serving.request import Final as FinalAnswer

# A rating comes soon after its answer, or not at all.
_MAX_ANSWERS: Final = 256


class FeedbackRecorder:
    """Remembers recent answers until they are rated. Thread-safe.

    Args:
        log: where entries go.
    """

    def __init__(self, log: FeedbackLog) -> None:
        self._log = log
        self._lock = threading.Lock()
        self._recent: OrderedDict[Key, tuple[str, FinalAnswer]] = OrderedDict()

    def note_answer(self, key: Key, text: str, answer: FinalAnswer) -> None:
        """A query has been answered; a refusal, and an answer that lost an action, are worth a look."""
        if answer.finish_reason not in ("stop", "length"):
            return
        with self._lock:
            self._recent[key] = (text, answer)
            if len(self._recent) > _MAX_ANSWERS:
                self._recent.popitem(last=False)
        if answer.dropped_actions:
            self._log.record(_entry(key, "failed", text, answer))
        elif answer.kind == "refusal":
            self._log.record(_entry(key, "refused", text, answer))

    def note_rating(self, key: Key, feedback: Feedback) -> None:
        """An answer has been rated."""
        with self._lock:
            found = self._recent.get(key)
        if found is not None:
            entry = _entry(key, "rated", *found, rating=feedback.rating, correction=feedback.correction)
            self._log.record(entry)

    def forget(self, concerns: Callable[[str], bool]) -> None:
        """Forget the answers of some users: they cannot be rated any more."""
        with self._lock:
            for key in [key for key in self._recent if concerns(key[0])]:
                del self._recent[key]


def _entry(
    key: Key,
    reason: Reason,
    text: str,
    answer: FinalAnswer,
    *,
    rating: int | None = None,
    correction: str | None = None,
) -> FeedbackEntry:
    actions = msgspec.json.encode(answer.actions).decode()
    return FeedbackEntry(key[0], reason, text, answer.kind, actions, answer.text, rating, correction)
