"""What is known to come again is prefilled while there is nothing else to do. In order:

1. sessions: the next turn's prompt, as far as it is known when an answer has ended;
2. what slots hold and the prefix cache does not;
3. prompt heads that everybody shares, and their snapshots;
4. what each user asks often;
5. and then the caches are looked after: prompts that vary near their head, and the tree's integrity.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Final

from edge_llm.bundle.prefix_file import PrefixKV
from edge_llm.engine.engine import MIN_CHUNK
from edge_llm.engine.prompt import Message
from edge_llm.errors import CacheIntegrityError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edge_llm.cache.reuse import PrefixReuse
    from edge_llm.serving.caches import Caches
    from edge_llm.serving.manners import Manners
    from edge_llm.serving.pacing import Pace
    from edge_llm.serving.request import Request
    from edge_llm.serving.sessions import SessionStore

_log = logging.getLogger(__name__)

_MAX_SESSIONS: Final = 16
_MAX_SYSTEMS: Final = 64
_POPULAR_PER_USER: Final = 4
_POPULAR_USERS: Final = 8
_POPULAR_INTERVAL_S: Final = 60.0
_INTEGRITY_INTERVAL_S: Final = 60.0


class Rewarming:
    """Belongs to the engine's thread. Times are ``time.monotonic()`` seconds.

    Args:
        caches: where prefixes are found and kept, and what is asked often.
        sessions: the turns before a query.
        pace: how much is computed at once.
        manners: how each user asks.
        clock: for tests.
    """

    def __init__(
        self, caches: Caches, sessions: SessionStore, pace: Pace, manners: Manners, clock: Callable[[], float]
    ) -> None:
        self._caches = caches
        self._reuse = caches.reuse
        self._slots = caches.reuse.engine.slots
        self._max_seq_len = caches.reuse.engine.max_seq_len
        self._sessions = sessions
        self._pace = pace
        self._manners = manners
        # A session's tokens are worked out once, when its turn to be warmed comes.
        self._waiting_sessions: OrderedDict[tuple[str, str], list[int] | None] = OrderedDict()
        self._heads: list[list[int]] = []
        self._systems: deque[tuple[str, str]] = deque(maxlen=_MAX_SYSTEMS)  # for the prefix lint
        self._popular: list[tuple[str, str]] = []
        self._popular_due = clock()
        self._integrity_due = clock() + _INTEGRITY_INTERVAL_S
        self.restart()

    def query_ended(self, request: Request) -> None:
        """A query has been answered: its session may go on."""
        if self._reuse.tree is None:
            return
        if self._caches.lint is not None and request.messages[0].role == "system":
            system = (request.user, request.messages[0].content)
            if system not in self._systems:
                self._systems.append(system)
        if request.session is not None:
            self._waiting_sessions[request.user, request.session] = None
            self._waiting_sessions.move_to_end((request.user, request.session))
            while len(self._waiting_sessions) > _MAX_SESSIONS:
                self._waiting_sessions.popitem(last=False)

    def step_session(self) -> bool:
        """One chunk of what the next turn of a session will begin with, the answer that has just ended included."""
        while self._waiting_sessions and self._slots.free_count:
            user, session = next(reversed(self._waiting_sessions))
            token_ids = self._waiting_sessions[user, session]
            if token_ids is None:
                token_ids = self._sessions.open_prompt(user, session, "", self._max_seq_len - 1)
                self._waiting_sessions[user, session] = token_ids
            if warm_chunk(self._reuse, self._pace, user, token_ids):
                return True
            self._reuse.keep_warm(user, token_ids)
            del self._waiting_sessions[user, session]
        return False

    def step_rest(self, now: float, *, allowed: bool, on_damage: Callable[[], None]) -> bool:
        """One unit of everything else. False if there is nothing to do.

        Args:
            now: the time.
            allowed: whether anything may be computed.
            on_damage: called when the prefix cache contradicts itself.
        """
        if self._reuse.save_one():
            return True
        if allowed and (self._warm_head() or self._warm_popular(now)):
            return True
        if self._lint():
            return True
        self._check_integrity(now, on_damage)
        return False

    def due_in_s(self, now: float, blocked_s: float) -> float:
        """Seconds until there may be something to do; ``blocked_s`` is how long nothing may be computed."""
        due_in_s = self._integrity_due - now
        if self._caches.popularity is not None and self._reuse.tree is not None:
            due_in_s = min(due_in_s, max(self._popular_due - now, blocked_s))
        return due_in_s

    def restart(self) -> None:
        """Begin anew: nothing is warm."""
        self._heads = list(self._reuse.shared_prefixes) if self._reuse.tree is not None else []
        self.forget_users()

    def forget_users(self) -> None:
        """Drop what users have said."""
        self._waiting_sessions.clear()
        self._popular.clear()
        self._systems.clear()

    def _warm_head(self) -> bool:
        """Prefill, pin and save what everybody's prompts begin with."""
        while self._heads and self._slots.free_count:
            head = self._heads[0]
            if self._reuse.saved_len(None, head) < len(head):
                if warm_chunk(self._reuse, self._pace, None, head, to_the_end=True):
                    return True
                self._reuse.keep_warm(None, head)
            match = self._reuse.pin(head)
            if match is not None and match.origin == "tree" and self._caches.snapshots is not None:
                self._caches.snapshots.save(PrefixKV(tuple(head), match.rows()))
            del self._heads[0]
        return False

    def _warm_popular(self, now: float) -> bool:
        """Prefill what each user asks often, if it is not answered from the response cache anyway."""
        popularity = self._caches.popularity
        if popularity is None or self._reuse.tree is None:
            return False
        if now >= self._popular_due:
            self._popular_due = now + _POPULAR_INTERVAL_S
            users = popularity.users()[:_POPULAR_USERS]
            self._popular = [(user, text) for user in users for text in popularity.top(user, _POPULAR_PER_USER)]
        if not (self._popular and self._slots.free_count):
            return False
        user, text = self._popular[0]
        token_ids = self._sessions.renderer.encode([Message("user", text)])
        answers = self._caches.answers
        answered = answers is not None and answers.has(user, None, text, self._manners.of(user), b"")
        if not answered and self._reuse.saved_len(user, token_ids) < len(token_ids) - MIN_CHUNK:
            if warm_chunk(self._reuse, self._pace, user, token_ids, to_the_end=True):
                return True
            self._reuse.keep_warm(user, token_ids)
        del self._popular[0]
        return True  # one at a time, for the queries that wait

    def _lint(self) -> bool:
        """Look whether a system message varies from query to query."""
        if not self._systems or self._caches.lint is None:
            return False
        user, system = self._systems.popleft()
        renderer = self._sessions.renderer
        self._caches.lint.observe(user, renderer.shared_prefix(system), renderer.decode)
        return True

    def _check_integrity(self, now: float, on_damage: Callable[[], None]) -> None:
        if now < self._integrity_due:
            return
        self._integrity_due = now + _INTEGRITY_INTERVAL_S
        if self._reuse.tree is None:
            return
        try:
            self._reuse.tree.check_integrity()
        except CacheIntegrityError:
            _log.exception("the prefix cache is emptied")
            on_damage()


def warm_chunk(
    reuse: PrefixReuse,
    pace: Pace,
    user: str | None,
    token_ids: Sequence[int],
    expires_at: float | None = None,
    *,
    to_the_end: bool = False,
) -> bool:
    """``PrefixReuse.warm`` at a pace. False if there was nothing left to compute."""
    started = time.perf_counter()
    computed = reuse.warm(user, token_ids, pace.chunk_tokens, expires_at, to_the_end=to_the_end)
    pace.account(computed, started)
    return computed > 0
