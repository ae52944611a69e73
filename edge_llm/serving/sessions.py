"""Conversations: the turns of a session, bounded in tokens, idle time and number."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edge_llm.engine.prompt import Message
from edge_llm.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edge_llm.engine.prompt import PromptRenderer


@dataclass
class _Session:
    turns: list[tuple[Message, Message]] = field(default_factory=list)  # (user, assistant)
    used_at: float = 0.0


class SessionStore:
    """Turns by (user, session name). Not thread-safe. Times are ``time.monotonic()`` seconds.

    Args:
        renderer: renders a conversation, to count its tokens.
        max_tokens: the most tokens that a session's rendered turns may have.
        idle_s: a session unused for this long is forgotten.
        max_sessions: bound on sessions; the one unused for longest goes first.
    """

    def __init__(self, renderer: PromptRenderer, *, max_tokens: int, idle_s: float, max_sessions: int) -> None:
        self._renderer = renderer
        self._max_tokens = max_tokens
        self._idle_s = idle_s
        self._max_sessions = max_sessions
        self._sessions: OrderedDict[tuple[str, str], _Session] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def prompt(self, user: str, name: str, new: Sequence[Message], room: int, now: float) -> list[int]:
        """Token ids of the session's turns and the new messages, at most ``room`` of them.

        The oldest turns are left out, whole, until it fits: the prompt is always one that the template would render.

        Raises:
            RequestError: 413, the new messages alone do not fit.
        """
        self.expire(now)
        session = self._sessions.get((user, name))
        turns = session.turns if session else []
        # Dropping is decided again for every query, since a smaller max_tokens leaves room for more turns.
        for first_turn in range(len(turns) + 1):
            history = [message for turn in turns[first_turn:] for message in turn]
            token_ids = self._renderer.encode([*history, *new])
            if len(token_ids) <= room:
                return token_ids
        raise too_long(len(token_ids), room)

    def add_turn(self, user: str, name: str, question: Message, answer: Message, now: float) -> None:
        """Remember a turn; the oldest ones are dropped beyond ``max_tokens``."""
        session = self._sessions.setdefault((user, name), _Session())
        session.turns.append((question, answer))
        session.used_at = now
        self._sessions.move_to_end((user, name))
        while session.turns and self._token_count(session) > self._max_tokens:
            del session.turns[0]
        while len(self._sessions) > self._max_sessions:
            self._sessions.popitem(last=False)

    def expire(self, now: float) -> None:
        """Forget sessions that have been idle too long."""
        while self._sessions:
            key, oldest = next(iter(self._sessions.items()))
            if now - oldest.used_at < self._idle_s:
                return
            del self._sessions[key]

    def _token_count(self, session: _Session) -> int:
        return len(self._renderer.encode([message for turn in session.turns for message in turn]))


def too_long(prompt_tokens: int, room: int) -> RequestError:
    """The error of a prompt that does not fit."""
    return RequestError(
        413,
        f"the prompt has {prompt_tokens} tokens, and the context has room for {room} beside max_tokens: "
        "shorten the text or lower max_tokens",
    )
