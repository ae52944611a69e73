"""The work that is done before a query has come. One unit at a time, only while no query runs or waits.

A unit is one prefill chunk, one decode step or one copy; the scheduler looks for queries after each. In order:

1. the transcript that is growing: its words so far are prefilled into a warm slot;
2. a transcript that looks final: its answer is generated ahead (speculation.py);
3. what is known to come again (rewarming.py).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from edge_llm.cache.normalise import normalise
from edge_llm.cache.state_db import ErasureWatch
from edge_llm.engine.prompt import Message
from edge_llm.errors import EngineError, RequestError
from edge_llm.serving.manners import Manners
from edge_llm.serving.pacing import Pace
from edge_llm.serving.rewarming import Rewarming, warm_chunk
from edge_llm.serving.speculation import Guess, Speculator
from edge_llm.serving.utterances import Utterance, Utterances

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edge_llm.cache.erasure import Erasure
    from edge_llm.cache.reuse import Started
    from edge_llm.engine.sampler import SamplingParams
    from edge_llm.serving.caches import Caches
    from edge_llm.serving.request import Request
    from edge_llm.serving.sessions import SessionStore

_ERASURE_INTERVAL_S: Final = 1.0
_MAX_CHARS_PER_TOKEN: Final = 6
# Nothing new for so long, and nobody is speaking any more.
_BETWEEN_WORDS_S: Final = 0.8
_SUSPENSION_S: Final = 60.0
_SHORTEST_WAIT_S: Final = 0.01


class Prefetcher:
    """Plans and runs prefetch. All but ``partial`` belongs to the engine's thread. Times: ``time.monotonic()`` seconds.

    Args:
        caches: where prefixes are found and kept, what to learn from, and what is allowed.
        sessions: the turns before an utterance.
        sampling: of a user who has not asked yet.
        default_max_tokens: what a query that names no ``max_tokens`` gets.
        clock: for tests.
    """

    def __init__(
        self,
        caches: Caches,
        sessions: SessionStore,
        sampling: SamplingParams,
        default_max_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._caches = caches
        self._reuse = reuse = caches.reuse
        self._engine = reuse.engine
        self._sessions = sessions
        self._config = config = caches.prefetch
        self._clock = clock
        self._utterances = Utterances(config.warm_s)
        self._settle_s = config.settle_ms / 1e3
        self._pace = Pace(self._engine.prefill_chunk, config, caches.power, clock)
        self._manners = Manners(sampling, default_max_tokens)
        self._rewarming = Rewarming(caches, sessions, self._pace, self._manners, clock)
        # A slot at least stays for whoever speaks next.
        self._speculator = Speculator(
            reuse, config.max_speculative_tokens, max_held=max(1, self._engine.slots.count - 1)
        )
        self._keep_awake_s = config.keep_awake_ms / 1e3 if config.partials and reuse.enabled else 0.0
        self._erasures = None if caches.db is None else ErasureWatch(caches.db)
        self._erasure_due = 0.0

    # --- from any thread ---------------------------------------------------------------------------------------------

    def partial(self, user: str, utterance: str, seq: int, text: str, session: str | None) -> bool:
        """Take a transcript that is still growing. False if it is stale."""
        return self._utterances.update(user, utterance, seq, text, session, self._clock())

    def utterance_ended(self, request: Request) -> None:
        """A query has come: nothing is prefetched for its utterance any more."""
        if request.utterance is not None:
            self._utterances.end(request.user, request.utterance, self._clock())

    # --- what queries tell -------------------------------------------------------------------------------------------

    def query_began(self, request: Request) -> None:
        """A query is about to be answered: its settings tell how its user asks."""
        self.utterance_ended(request)
        if request.cache == "use":
            self._manners.note(request)

    def query_ended(self, request: Request) -> None:
        """A query has been answered: it may be asked again, and its session may go on."""
        if request.cache != "use":
            return
        if self._caches.popularity is not None and len(request.messages) == 1:
            self._caches.popularity.record(request.user, request.messages[0].content)
        self._rewarming.query_ended(request)

    def release_guess(self, request: Request, room: int, max_tokens: int) -> Started | None:
        """The answer that was begun for this query, if there is one; every other guess at its utterance is dropped.

        Args:
            request: the query, which has just begun.
            room: for its prompt, in tokens.
            max_tokens: of its answer.
        """
        guesses = self._speculator.answering(request)
        guess = next((guess for guess in guesses if self._is_current(guess, room)), None)
        started = None if guess is None else self._speculator.release(guess, max_tokens)
        if request.utterance is not None:
            self._speculator.drop(request.user, request.utterance)
        return started

    def _is_current(self, guess: Guess, room: int) -> bool:
        """Whether a guess answers its question after the session's turns as they are now."""
        if guess.session is None:
            return True
        question = [Message("user", guess.text)]
        try:
            return self._sessions.prompt(guess.user, guess.session, question, room, self._clock()) == guess.prompt_ids
        except RequestError:
            return False

    @property
    def held_slots(self) -> int:
        """Slots that guesses keep, and that a query may have."""
        return len(self._speculator)

    def give_slot(self) -> bool:
        """Give up a guess for a query that needs its slot. False if there is none."""
        return self._speculator.give_slot()

    def close(self) -> None:
        """Give up every guess."""
        while self._speculator.give_slot():
            pass

    def forget(self, erasure: Erasure) -> None:
        """Some users are to be forgotten. What is computed is dropped for all users: it only costs time."""
        self._utterances.forget(erasure.concerns)
        self._forget_users()

    def recover(self) -> None:
        """After a fault: what was being warmed may be half there. Nothing of it is used, nor done again at once."""
        self._reuse.metrics.count("prefetch_faults")
        self.close()
        self._reuse.forget()
        self._rewarming.restart()
        self._pace.suspend(_SUSPENSION_S)

    # --- units of work -----------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Do one unit of work. False if there is nothing to do before ``due_in_s``."""
        now = self._clock()
        self._notice_erasure(now)
        growing = self._utterances.growing(now)
        if len(self._speculator):
            self._speculator.drop_where_not({(said.user, said.name) for said in growing})
            for said in growing:
                if not said.judged:
                    self._speculator.drop_contradicted(said.user, said.name, said.text)
        self._reuse.expire(now)
        allowed = self._pace.blocked_s() <= 0
        if allowed and (self._listen(growing) or self._speculate(growing)):
            return True
        if allowed and self._rewarming.step_session():
            return True
        if allowed and self._keep_awake(growing, now):
            return True
        return self._rewarming.step_rest(now, allowed=allowed, on_damage=self.recover)

    def due_in_s(self, longest_s: float) -> float:
        """Seconds, at most ``longest_s``, until ``step`` may have something to do without anybody's doing."""
        now = self._clock()
        blocked_s = self._pace.blocked_s()
        due = [longest_s, self._rewarming.due_in_s(now, blocked_s)]
        if self._config.partials:
            growing = self._utterances.growing(now)
            if self._speaking(growing, now):
                due.append(max(self._pace.computed_at + self._keep_awake_s - now, blocked_s))
            due += [max(said.updated_at + self._settle_s - now, blocked_s) for said in growing if not said.settled]
        if (expiry := self._reuse.next_expiry()) is not None:
            due.append(expiry - now)
        if blocked_s > 0:
            due.append(blocked_s)
        return max(min(due), _SHORTEST_WAIT_S)

    def _listen(self, growing: Sequence[Utterance]) -> bool:
        """Prefill what the latest speaker has said so far."""
        if not (self._config.partials and self._reuse.enabled):
            return False
        for said in growing:
            if not said.settled and self._clock() >= said.updated_at + self._settle_s:
                said.settle()
            if said.warmed:
                continue
            if len(said.text) > _MAX_CHARS_PER_TOKEN * self._engine.max_seq_len:
                said.warmed = True  # its query will be too long
                continue
            if said.target_ids is None:
                # Room for an answer of one token: the session's turns are those that a short query would have.
                room = self._engine.max_seq_len - 1
                said.target_ids = self._sessions.open_prompt(said.user, said.session, said.stable_text, room)
            expires_at = said.updated_at + self._config.warm_s
            if not warm_chunk(self._reuse, self._pace, said.user, said.target_ids, expires_at, to_the_end=said.settled):
                said.warmed = True
            return True  # moving a prefix into a slot is work, too
        return False

    def _speculate(self, growing: Sequence[Utterance]) -> bool:
        """Answer ahead what looks final."""
        if not (self._config.speculation and self._reuse.enabled):
            return False
        for said in growing:
            if not said.judged:
                said.judged = True
                if self._guess(said):
                    return True
        started = time.perf_counter()
        computed = self._speculator.step(self._pace.chunk_tokens)
        self._pace.account(computed, started)
        return computed > 0

    def _guess(self, said: Utterance) -> bool:
        """Begin an answer to what an utterance is expected to become. False if nothing was begun."""
        held = self._speculator.find(said.user, said.name)
        expected = self._expected(said)
        if held is not None:
            same = normalise(expected or said.text)
            if normalise(held.text).startswith(same) and held.session == said.session:
                return False  # it may still be right
            self._speculator.drop(said.user, said.name)
        manner = self._manners.of(said.user)
        if expected is None or said.tries >= self._config.max_tries or not manner.sampling.deterministic:
            return False
        answers, history = self._caches.answers, self._sessions.digest(said.user, said.session)
        answered = answers is not None and answers.has(said.user, said.session, expected, manner, history)
        if answered or self._engine.free_slots < 2:
            return False
        context = self._engine.max_seq_len
        max_tokens = min(manner.max_tokens or self._manners.default_max_tokens, context // 2)
        question, room = [Message("user", expected)], context - max_tokens
        try:
            prompt_ids = self._sessions.prompt(said.user, said.session, question, room, self._clock())
            started = self._reuse.start(said.user, prompt_ids, manner.sampling, max_tokens, ahead=True)
        except (RequestError, EngineError):
            return False  # too long: the query will be told
        self._utterances.count_try(said)
        expires_at = said.updated_at + self._config.warm_s
        self._speculator.begin(Guess(said.user, said.name, said.session, expected, started, expires_at))
        return True

    def _expected(self, said: Utterance) -> str | None:
        """The query that a transcript is likely to be, or None."""
        if not normalise(said.text):
            return None
        popularity = self._caches.popularity
        if popularity is not None:
            if (known := popularity.known(said.user, said.text)) is not None:
                return known
            prediction = popularity.predict(said.user, said.text)
            if prediction is not None and prediction.confidence >= self._config.min_confidence:
                return prediction.text
        # The speaker has paused: nothing new in two partials.
        return said.text if said.unchanged else None

    def _keep_awake(self, growing: Sequence[Utterance], now: float) -> bool:
        """Run a step for its effect on the processor alone, if somebody is speaking and nothing ran for a while."""
        if not self._speaking(growing, now) or now < self._pace.computed_at + self._keep_awake_s:
            return False
        self._pace.account(1, time.perf_counter())
        self._reuse.metrics.count("awake_steps")
        return self._reuse.run_for_nothing()

    def _speaking(self, growing: Sequence[Utterance], now: float) -> bool:
        return self._keep_awake_s > 0 and bool(growing) and now < growing[0].updated_at + _BETWEEN_WORDS_S

    def _notice_erasure(self, now: float) -> None:
        """What `edge-llm cache clear` has erased on the disk is forgotten here, too."""
        if self._erasures is None or now < self._erasure_due:
            return
        self._erasure_due = now + _ERASURE_INTERVAL_S
        if self._erasures.erased():
            self._forget_users()

    def _forget_users(self) -> None:
        self.close()
        self._reuse.forget_users()
        self._rewarming.forget_users()
        self._manners.clear()
