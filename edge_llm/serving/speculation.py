"""Answers that are generated before their query has come, and released only to that query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edge_llm.cache.normalise import normalise

if TYPE_CHECKING:
    from edge_llm.cache.reuse import PrefixReuse, Started
    from edge_llm.serving.request import Request


@dataclass(frozen=True, eq=False)
class Guess:
    """An answer in the making.

    Attributes:
        user: who is expected to ask.
        utterance: whose partials led to the guess.
        session: of the expected query.
        text: the expected question.
        started: the sequence; it keeps its slot. Its prompt is the question after the session's turns as they were.
        expires_at: ``time.monotonic()`` seconds, when nobody is expected to ask any more.
    """

    user: str
    utterance: str
    session: str | None
    text: str
    started: Started
    expires_at: float

    @property
    def prompt_ids(self) -> list[int]:
        """What is being answered."""
        return self.started.state.prompt_ids

    def may_answer(self, request: Request) -> bool:
        """Whether a query asks just this, in the same way; its session may have gone on meanwhile."""
        return (
            self.user == request.user
            and self.session == request.session
            and request.cache == "use"
            and self.started.state.sampler.params == request.sampling
            and len(request.messages) == 1
            and normalise(self.text) == normalise(request.messages[0].content)
        )

    @property
    def computed(self) -> int:
        """Tokens that were computed for it."""
        state = self.started.state
        return state.cached_len - state.reused_len


class Speculator:
    """Holds at most ``max_held`` guesses, one an utterance. Belongs to the engine's thread.

    Args:
        reuse: lends slots of its engine; its metrics count what was computed, used and wasted.
        max_tokens: the most tokens that are generated ahead.
        max_held: bound on the guesses, and so on the slots that they keep.
    """

    def __init__(self, reuse: PrefixReuse, max_tokens: int, max_held: int) -> None:
        self._engine = reuse.engine
        self._reuse = reuse
        self._metrics = reuse.metrics
        self._max_tokens = max_tokens
        self._max_held = max_held
        self._held: list[Guess] = []

    def __len__(self) -> int:
        return len(self._held)

    def drop_contradicted(self, user: str, utterance: str, text: str) -> None:
        """Forget the guess at an utterance that has gone another way."""
        guess = self.find(user, utterance)
        if guess is not None and not normalise(guess.text).startswith(normalise(text)):
            self._drop(guess)

    def begin(self, guess: Guess) -> None:
        """Hold a guess whose sequence has just been started."""
        self.drop(guess.user, guess.utterance)
        self._held.append(guess)
        self._metrics.count("speculations_started")
        while len(self._held) > self._max_held:
            self._drop(self._held[0])

    def find(self, user: str, utterance: str) -> Guess | None:
        """The guess at what an utterance will be."""
        return next((guess for guess in self._held if (guess.user, guess.utterance) == (user, utterance)), None)

    def step(self, max_chunk: int) -> int:
        """Generate a little more of the newest unfinished guess; returns how many tokens were computed."""
        for guess in reversed(self._held):
            state = guess.started.state
            if state.fault is not None:
                self._drop(guess, keep=False)
                return 0
            if state.finished or len(state.output_ids) >= self._max_tokens:
                continue
            before = state.cached_len
            try:
                if state.prefilled:
                    self._engine.decode([state])
                else:
                    self._engine.prefill(state, max_chunk)
            except Exception:
                self._drop(guess, keep=False)
                raise
            computed = state.cached_len - before
            self._metrics.count("prefetch_tokens_computed", computed)
            return computed
        return 0

    def answering(self, request: Request) -> list[Guess]:
        """The guesses that a query may have."""
        return [guess for guess in self._held if guess.may_answer(request)]

    def release(self, guess: Guess, max_tokens: int) -> Started | None:
        """Hand a guess over to its query, whose answer has at most ``max_tokens``. None if it cannot go on."""
        state = guess.started.state
        if state.fault is not None or len(state.prompt_ids) + max_tokens - 1 > self._engine.max_seq_len:
            self._drop(guess, keep=state.fault is None)
            return None
        self._held.remove(guess)
        state.max_tokens = max_tokens
        # A query with this limit would have ended there, before it saw a stop token.
        if len(state.output_ids) >= max_tokens:
            del state.output_ids[max_tokens:]
            state.stopped = False
        self._metrics.count("prefetch_tokens_used", guess.computed)
        self._metrics.count("speculations_released")
        return guess.started

    def drop(self, user: str, utterance: str) -> None:
        """Forget the guess at an utterance."""
        guess = self.find(user, utterance)
        if guess is not None:
            self._drop(guess)

    def drop_where_not(self, alive: set[tuple[str, str]]) -> None:
        """Forget the guesses at utterances that nobody will finish."""
        for guess in list(self._held):
            if (guess.user, guess.utterance) not in alive:
                self._drop(guess)

    def give_slot(self) -> bool:
        """Forget the oldest guess, for somebody who needs its slot. False if there is none."""
        if not self._held:
            return False
        self._drop(self._held[0])
        return True

    def _drop(self, guess: Guess, *, keep: bool = True) -> None:
        self._held.remove(guess)
        self._metrics.count("prefetch_tokens_wasted", guess.computed)
        self._metrics.count("speculations_dropped")
        self._reuse.release(guess.started, keep=keep, expires_at=guess.expires_at)
