"""One engine thread: admit → prefill a chunk → decode a batch → deliver, and again.

Requests wait in a fair queue, take a slot, are prefilled chunk by chunk, then decode together with every other active
request, one token a step. They join and leave between steps; cancels and deadlines act there too. While there is
nothing to do, prefetch.py works ahead, one small unit at a time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from dataclasses import replace
from typing import TYPE_CHECKING

from edge_llm.device.memory import trim_memory
from edge_llm.engine.sampler import SamplingParams
from edge_llm.engine.text_stream import TextStream
from edge_llm.errors import RequestError
from edge_llm.serving.active import ActiveRequest, deliver, refuse
from edge_llm.serving.caches import Caches, no_caches
from edge_llm.serving.prefetch import Prefetcher
from edge_llm.serving.queue import FairQueue
from edge_llm.serving.request import Delta, Final, Timing, Usage
from edge_llm.serving.running import Running, internal_error
from edge_llm.serving.sessions import SessionStore

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge_llm.bundle.manifest import GenerationDefaults
    from edge_llm.cache.erasure import Erasure
    from edge_llm.config import ServingConfig
    from edge_llm.domain.domain import Domain
    from edge_llm.engine.engine import Engine
    from edge_llm.engine.prompt import PromptRenderer
    from edge_llm.engine.tokenizer import Tokenizer
    from edge_llm.serving.active import AnswerText
    from edge_llm.serving.failover import Failover
    from edge_llm.serving.request import Request

_log = logging.getLogger(__name__)

IDLE_TICK_S = 1.0
_HURRY_TICK_S = 0.1
# Idle for so long, the buffers that prefills have left in the C library go back to the system.
_TRIM_AFTER_S = 0.2
_MAX_ANSWERED = 256


class Scheduler:
    """Owns the engine and the thread that runs it. ``submit``, ``cancel`` and ``drain`` may be called from any thread.

    Args:
        engine: the engine; nobody else may touch it once ``start`` has been called.
        tokenizer: decodes answers.
        renderer: encodes conversations.
        defaults: what a request that sets no ``max_tokens`` gets.
        config: the bounds.
        caches: what is remembered of earlier work; None is nothing.
        domain: of a domain bundle, whose answers hold actions; None for a model that just writes.

    Attributes:
        heartbeat: touched by the engine thread between two runs of the engine, and once a second when it is idle.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        renderer: PromptRenderer,
        defaults: GenerationDefaults,
        config: ServingConfig,
        *,
        caches: Caches | None = None,
        domain: Domain | None = None,
    ) -> None:
        self._domain = domain
        default_max_tokens = min(defaults.max_tokens, config.max_tokens)
        self._sessions = SessionStore(
            renderer,
            # Half of the context for what was said before leaves the other half for the question and the answer.
            max_tokens=engine.max_seq_len // 2,
            idle_s=config.session_idle_s,
            max_sessions=config.max_sessions,
        )
        self._caches = caches or no_caches(engine)
        sampling = SamplingParams.from_defaults(defaults)
        self._prefetch = Prefetcher(self._caches, self._sessions, sampling, default_max_tokens)
        # From the response cache, for prefetch to learn from; the oldest are forgotten while it has no time.
        self._answered: deque[Request] = deque(maxlen=_MAX_ANSWERED)
        self._erasures: deque[Erasure] = deque()
        self._news = False  # something has come that prefetch has not looked at
        self._queue = FairQueue(config.max_queued, config.max_queued_per_user)
        self._running = Running(
            engine,
            renderer,
            _text_maker(tokenizer, renderer, domain),
            self._sessions,
            self._caches,
            self._prefetch,
            default_max_tokens,
        )
        self._changed = self._running.changed
        self._draining = False
        self._stopping = False
        self.heartbeat = self._running.heartbeat
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # --- from any thread -------------------------------------------------------------------------------------------

    def start(self, failover: Failover | None = None) -> None:
        """Start the engine thread; ``failover`` goes on with another provider when this one fails."""
        self._running.failover = failover
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Queue a request, or answer it at once. A refusal arrives through ``request.on_event``; nothing is raised."""
        if self._domain is not None:
            request = _alone(request)
        try:
            if self._answer_from_cache(request):
                return
            with self._changed:
                if self._draining:
                    raise RequestError(503, "this device is shutting down: ask again in a moment", retry_after_ms=2000)
                self._queue.push(request)
                self._changed.notify()
        except RequestError as error:
            refuse(request, error)

    def cancel(self, user: str, request_id: str) -> bool:
        """Stop a request, queued or running: it ends with a ``cancelled`` final. False if there is no such request."""
        key = (user, request_id)
        with self._changed:
            known = any(request.key == key for request in self._queue) or any(
                active.request.key == key for active in self._running.active
            )
            if known:
                self._running.cancelled.add(key)
                self._changed.notify()
        return known

    def partial(self, user: str, utterance: str, seq: int, text: str, session: str | None) -> bool:
        """Take a transcript that is still growing: it is prefilled while nothing else runs. False if it is stale."""
        taken = self._prefetch.partial(user, utterance, seq, text, session if self._domain is None else None)
        if taken:
            with self._changed:
                self._news = True
                self._changed.notify()
        return taken

    def forget(self, erasure: Erasure) -> None:
        """Drop soon what some users have said: their sessions, and what was computed for anybody."""
        with self._changed:
            self._erasures.append(erasure)
            self._answered = deque(
                (request for request in self._answered if not erasure.concerns(request.user)), _MAX_ANSWERED
            )
            self._news = True
            self._changed.notify()

    @property
    def load(self) -> dict[str, int]:
        """Requests waiting and running, and sessions kept."""
        with self._changed:
            return {"queued": len(self._queue), "active": len(self._running.active), "sessions": len(self._sessions)}

    def drain(self, timeout_s: float, hurry: threading.Event | None = None) -> bool:
        """Refuse new requests, wait for the accepted ones, then stop. True if all of them were answered in time.

        What is left after ``timeout_s``, or when ``hurry`` is set, ends as cancelled, with the text so far.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._draining = True
            while self._queue or self._running.active:
                remaining_s = deadline - time.monotonic()
                if remaining_s <= 0 or (hurry is not None and hurry.is_set()):
                    break
                self._changed.wait(min(remaining_s, _HURRY_TICK_S))
            in_time = not self._queue and not self._running.active
            self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        return in_time

    def _answer_from_cache(self, request: Request) -> bool:
        """Answer on the caller's thread: the engine's may be in the middle of a chunk."""
        # In a session the answer depends on the turns before, which only the engine's thread knows.
        if self._caches.answers is None or request.session is not None:
            return False
        found = self._caches.answers.find(request)
        if found is None:
            return False
        with self._changed:
            if self._draining:
                return False
            self._answered.append(request)
            self._prefetch.utterance_ended(request)
            self._news = True
            self._changed.notify()
        deliver(request, Delta(found.text))
        deliver(request, found)
        return True

    # --- the engine thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            self._prefetch_until_needed()
            try:
                self._step()
            except Exception:
                # Nothing below should raise; if it does, its victims are told and the thread lives on.
                _log.exception("a fault in the scheduler")
                self._fail_all()
            with self._changed:
                if not self._queue and not self._running.active:
                    self._changed.notify_all()  # drain waits for this
                    if self._stopping:
                        self._prefetch.close()
                        return

    def _prefetch_until_needed(self) -> None:
        """Work ahead, or wait, until there is a query or the end."""
        trim_at: float | None = time.monotonic() + _TRIM_AFTER_S
        worked = True
        while True:
            self.heartbeat.beat()
            # Worked out before the lock is taken: it may look at sensors, and the network's thread must not wait.
            due_in_s = 0.0 if worked else self._prefetch.due_in_s(IDLE_TICK_S if trim_at is None else _TRIM_AFTER_S)
            with self._changed:
                if not (self._queue or self._running.active or self._stopping or worked or self._news):
                    self._changed.wait(due_in_s)
                self._news = False
                if self._stopping:
                    self._running.cancelled |= {request.key for request in self._queue}
                    self._running.cancelled |= {active.request.key for active in self._running.active}
                if self._queue or self._running.active or self._stopping:
                    return
            now = time.monotonic()
            self._sessions.expire(now)
            worked = self._prefetch_step()
            if trim_at is not None and now >= trim_at and not worked:
                trim_memory()
                trim_at = None

    def _forget_erased(self) -> None:
        while self._erasures:
            erasure = self._erasures.popleft()
            self._sessions.forget(erasure.concerns)
            self._prefetch.forget(erasure)

    def _prefetch_step(self) -> bool:
        try:
            self._forget_erased()
            while self._answered:
                request = self._answered.popleft()
                self._prefetch.query_began(request)
                self._prefetch.query_ended(request)
            return self._prefetch.step()
        except Exception:
            _log.exception("a fault in prefetch: what was warm is dropped, and nothing is prefetched for a while")
            self._prefetch.recover()
            return False

    def _step(self) -> None:
        self._forget_erased()
        self._caches.power.refresh()
        self._end_unwanted()
        self._admit()
        self._running.prefill()
        self._running.decode()

    def _end_unwanted(self) -> None:
        """Cancels and deadlines, for waiting and running requests alike."""
        now = time.monotonic()
        with self._changed:
            cancelled, self._running.cancelled = self._running.cancelled, set()
            removed = self._queue.remove_where(lambda request: request.key in cancelled or _expired(request, now))
        for request in removed:
            if request.key in cancelled:
                waited_ms = (now - request.received_at) * 1e3
                timing = Timing(queue_ms=waited_ms, prefill_ms=0.0, ttft_ms=None, total_ms=waited_ms)
                deliver(request, Final("", "cancelled", Usage(), timing))
            else:
                refuse(request, RequestError(408, "the deadline passed before the query could start"))
        for active in list(self._running.active):
            if active.request.key in cancelled:
                self._running.end(active, "cancelled")
            elif _expired(active.request, now):
                self._running.end(active, "deadline")

    def _admit(self) -> None:
        """Give free slots to waiting requests; what was only guessed makes room."""
        while True:
            with self._changed:
                running = Counter(active.request.user for active in self._running.active)
                request = self._queue.pop(running, self._running.eligible)
                if request is None:
                    return
                # Booked at once, so that a cancel which comes now finds it.
                active = self._running.book(request)
            self._running.begin(active)

    def _fail_all(self) -> None:
        with self._changed:
            waiting = self._queue.remove_where(lambda _request: True)
        self._running.fail_all()
        for request in waiting:
            refuse(request, internal_error())


def _alone(request: Request) -> Request:
    """A domain model has learnt to answer one utterance; what came before it would only confuse it."""
    if any(message.role == "system" for message in request.messages):
        return request  # to be refused, not to be answered as if it had not been said
    return replace(request, session=None, messages=request.messages[-1:])


def _expired(request: Request, now: float) -> bool:
    return request.deadline_at is not None and now >= request.deadline_at


def _text_maker(
    tokenizer: Tokenizer, renderer: PromptRenderer, domain: Domain | None
) -> Callable[[ActiveRequest], AnswerText]:
    """Makes what reads the tokens of an answer."""

    def make_text(active: ActiveRequest) -> AnswerText:
        stop = (*renderer.template.stop_strings, *active.request.stop)
        if domain is None:
            return TextStream(tokenizer, stop)
        return domain.answer(lambda: None if active.state is None else active.state.sampler, stop)

    return make_text
