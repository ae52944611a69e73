"""Conversations: the turns of a session, bounded in tokens, idle time and number."""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from edge_llm.engine.prompt import Message
from edge_llm.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edge_llm.engine.prompt import PromptRenderer


@dataclass(frozen=True)
class _Turn:
    question: Message
    answer: Message
    token_count: int


@dataclass
class _Session:
    turns: list[_Turn] = field(default_factory=list)
    used_at: float = 0.0


class SessionStore:
    """Turns by (user, session name). Not thread-safe. Times are ``time.monotonic()`` seconds.

    Args:
        renderer: renders a conversation, to count its tokens.
        max_tokens: the most tokens that a session's rendered turns may have.
        idle_s: a session unused for this long is forgotten.
        max_sessions: bound on sessions; of the user who has the most, the one unused for longest goes first.
    """

    def __init__(self, renderer: PromptRenderer, *, max_tokens: int, idle_s: float, max_sessions: int) -> None:
        self.renderer = renderer
        self._max_tokens = max_tokens
        self._idle_s = idle_s
        self._max_sessions = max_sessions
        self._empty_count = len(renderer.encode([]))  # what every prompt has: prefix, default system, generation prompt
        self._sessions: OrderedDict[tuple[str, str], _Session] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def prompt(self, user: str, name: str | None, new: Sequence[Message], room: int, now: float) -> list[int]:
        """Token ids of the session's turns (none without a session) and the new messages, at most ``room`` of them.

        The oldest turns are left out, whole, until it fits: the prompt is always one that the template would render.

        Raises:
            RequestError: 413, the new messages alone do not fit.
        """
        self.expire(now)
        token_ids = self.renderer.encode(new)
        if len(token_ids) > room:
            raise too_long(len(token_ids), room)
        turns = self._turns(user, name)
        # Counts of single turns tell where to begin; only then is a whole conversation rendered. They add up exactly
        # where special tokens separate the turns, and nearly so elsewhere, hence the loop.
        first_turn = _first_fitting([turn.token_count for turn in turns], room - len(token_ids))
        while first_turn < len(turns):
            candidate = self.renderer.encode([*_messages(turns[first_turn:]), *new])
            if len(candidate) <= room:
                return candidate
            first_turn += 1
        return token_ids

    def open_prompt(self, user: str, name: str | None, text: str, room: int) -> list[int]:
        """The beginning of the prompt of a question that begins with ``text`` and goes on, as far as it is certain.

        Args:
            user: who asks.
            name: the session; None for a question of its own.
            text: whole words; may be empty.
            room: for the prompt that it will become.
        """
        alone = self.renderer.open_prefix([], text)
        turns = self._turns(user, name)
        turns = turns[_first_fitting([turn.token_count for turn in turns], room - len(alone)) :]
        return self.renderer.open_prefix(_messages(turns), text) if turns else alone

    def digest(self, user: str, name: str | None) -> bytes:
        """A hash of everything before a question that its answer depends on; empty without a session."""
        if name is None:
            return b""
        said = [[turn.question.content, turn.answer.content] for turn in self._turns(user, name)]
        return hashlib.blake2b(msgspec.json.encode(said), digest_size=16).digest()

    def _turns(self, user: str, name: str | None) -> list[_Turn]:
        session = None if name is None else self._sessions.get((user, name))
        return session.turns if session else []

    def add_turn(self, user: str, name: str, question: Message, answer: Message, now: float) -> None:
        """Remember a turn; the oldest ones are dropped beyond ``max_tokens``."""
        session = self._sessions.setdefault((user, name), _Session())
        session.turns.append(_Turn(question, answer, self._count_turn(question, answer)))
        session.used_at = now
        self._sessions.move_to_end((user, name))
        del session.turns[: _first_fitting([turn.token_count for turn in session.turns], self._max_tokens)]
        while len(self._sessions) > self._max_sessions:
            self._evict()

    def _evict(self) -> None:
        """Forget the oldest session of the user who has the most, so that nobody pushes out the others."""
        counts = Counter(user for user, _ in self._sessions)
        largest = max(counts.values())
        key = next(key for key in self._sessions if counts[key[0]] == largest)
        del self._sessions[key]

    def forget(self, concerns: Callable[[str], bool]) -> None:
        """Forget the sessions of some users."""
        for key in [key for key in self._sessions if concerns(key[0])]:
            del self._sessions[key]

    def expire(self, now: float) -> None:
        """Forget sessions that have been idle too long."""
        while self._sessions:
            key, oldest = next(iter(self._sessions.items()))
            if now - oldest.used_at < self._idle_s:
                return
            del self._sessions[key]

    def _count_turn(self, question: Message, answer: Message) -> int:
        """Tokens that a turn adds to a prompt."""
        return len(self.renderer.encode([question, answer])) - self._empty_count


def _messages(turns: Sequence[_Turn]) -> list[Message]:
    return [message for turn in turns for message in (turn.question, turn.answer)]


def _first_fitting(counts: Sequence[int], room: int) -> int:
    """The first of the turns from which on all fit into ``room`` tokens."""
    total = 0
    for index in range(len(counts) - 1, -1, -1):
        total += counts[index]
        if total > room:
            return index + 1
    return 0


def too_long(prompt_tokens: int, room: int) -> RequestError:
    """The error of a prompt that does not fit."""
    return RequestError(
        413,
        f"the prompt has {prompt_tokens} tokens, and the context has room for {room} beside max_tokens: "
        "shorten the text or lower max_tokens",
    )
