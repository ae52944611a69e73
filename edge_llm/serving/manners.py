"""How each user asks: the settings of their latest query, which the next one is likely to have, too."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from edge_llm.serving.request import Settings

if TYPE_CHECKING:
    from edge_llm.engine.sampler import SamplingParams
    from edge_llm.serving.request import Request

_MAX_USERS: Final = 256


class Manners:
    """The latest manner of the latest users.

    Args:
        sampling: of a user who has not asked yet.
        default_max_tokens: what a query that names no ``max_tokens`` gets.
    """

    def __init__(self, sampling: SamplingParams, default_max_tokens: int) -> None:
        self.default_max_tokens = default_max_tokens
        self._default = Settings(sampling, None, ())
        self._by_user: OrderedDict[str, Settings] = OrderedDict()

    def note(self, request: Request) -> None:
        """A query has come."""
        self._by_user[request.user] = request.settings
        self._by_user.move_to_end(request.user)
        while len(self._by_user) > _MAX_USERS:
            self._by_user.popitem(last=False)

    def of(self, user: str) -> Settings:
        """How a user is expected to ask."""
        return self._by_user.get(user, self._default)

    def clear(self) -> None:
        """Forget every user."""
        self._by_user.clear()
