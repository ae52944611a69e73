"""How each user asks: the settings of their latest query, which the next one is likely to have, too."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from edge_llm.engine.sampler import SamplingParams
    from edge_llm.serving.answers import Answers
    from edge_llm.serving.request import Request

_MAX_USERS: Final = 256


@dataclass(frozen=True)
class Manner:
    """The settings of a query. ``max_tokens`` None leaves it to the default."""

    sampling: SamplingParams
    max_tokens: int | None
    stop: tuple[str, ...]


class Manners:
    """The latest manner of the latest users.

    Args:
        sampling: of a user who has not asked yet.
        default_max_tokens: what a query that names no ``max_tokens`` gets.
    """

    def __init__(self, sampling: SamplingParams, default_max_tokens: int) -> None:
        self.default_max_tokens = default_max_tokens
        self._default = Manner(sampling, None, ())
        self._by_user: OrderedDict[str, Manner] = OrderedDict()

    def note(self, request: Request) -> None:
        """A query has come."""
        self._by_user[request.user] = Manner(request.sampling, request.max_tokens, request.stop)
        self._by_user.move_to_end(request.user)
        while len(self._by_user) > _MAX_USERS:
            self._by_user.popitem(last=False)

    def of(self, user: str) -> Manner:
        """How a user is expected to ask."""
        return self._by_user.get(user, self._default)

    def is_answered(self, answers: Answers | None, user: str, session: str | None, text: str, history: bytes) -> bool:
        """Whether the response cache has the answer to a question that is asked as usual."""
        manner = self.of(user)
        settings = (manner.sampling, manner.max_tokens, manner.stop)
        return answers is not None and answers.has(user, session, text, settings, history)

    def clear(self) -> None:
        """Forget every user."""
        self._by_user.clear()
