"""One engine thread: admit → prefill a chunk → decode a batch → deliver, and again.

Requests wait in a fair queue, take a slot, are prefilled chunk by chunk, then decode together with every other active
request, one token a step. They join and leave between steps; cancels and deadlines act there too. While there is
nothing to do, prefetch.py works ahead, one small unit at a time.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter, deque
from dataclasses import replace
from typing import TYPE_CHECKING

from edge_llm.device.memory import trim_memory
from edge_llm.engine.prompt import Message
from edge_llm.engine.sampler import SamplingParams
from edge_llm.engine.text_stream import TextStream
from edge_llm.errors import RequestError
from edge_llm.notify import Heartbeat
from edge_llm.serving.active import ActiveRequest, deliver, refuse
from edge_llm.serving.caches import Caches, no_caches
from edge_llm.serving.prefetch import Prefetcher
from edge_llm.serving.queue import FairQueue
from edge_llm.serving.request import Delta, Final, Timing, Usage
from edge_llm.serving.sessions import SessionStore

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edge_llm.bundle.manifest import GenerationDefaults
    from edge_llm.config import ServingConfig
    from edge_llm.domain.domain import Domain
    from edge_llm.engine.engine import Engine
    from edge_llm.engine.prompt import PromptRenderer
    from edge_llm.engine.tokenizer import Tokenizer
    from edge_llm.serving.active import AnswerText
    from edge_llm.serving.failover import Failover
    from edge_llm.serving.request import FinishReason, Request

_log = logging.getLogger(__name__)

IDLE_TICK_S = 1.0
_HURRY_TICK_S = 0.1
_FIRST_TEXT_PAUSE_S = 0.001
# Idle for so long, the buffers that prefills have left in the C library go back to the system.
_TRIM_AFTER_S = 0.2
_MAX_ANSWERED = 256
# Another provider may have to be prepared first, which takes minutes on the slowest boards.
_LOAD_TIMEOUT_S = 1800.0


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
        failover: goes on with another provider when this one fails; None never does. Set it before ``start``.
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
        self._engine = engine
        self._tokenizer = tokenizer
        self._domain = domain
        self.failover: Failover | None = None
        self._renderer = renderer
        self._default_max_tokens = min(defaults.max_tokens, config.max_tokens)
        self._sessions = SessionStore(
            renderer,
            # Half of the context for what was said before leaves the other half for the question and the answer.
            max_tokens=engine.max_seq_len // 2,
            idle_s=config.session_idle_s,
            max_sessions=config.max_sessions,
        )
        self._caches = caches or no_caches(engine)
        self._reuse = self._caches.reuse
        sampling = SamplingParams.from_defaults(defaults)
        self._prefetch = Prefetcher(self._caches, self._sessions, sampling, self._default_max_tokens)
        # From the response cache, for prefetch to learn from; the oldest are forgotten while it has no time.
        self._answered: deque[Request] = deque(maxlen=_MAX_ANSWERED)
        self._news = False  # something has come that prefetch has not looked at
        self._queue = FairQueue(config.max_queued, config.max_queued_per_user)
        self._active: list[ActiveRequest] = []
        self._cancelled: set[tuple[str, str]] = set()
        self._changed = threading.Condition()
        self._draining = False
        self._stopping = False
        self.heartbeat = Heartbeat()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # --- from any thread -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the engine thread."""
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
                active.request.key == key for active in self._active
            )
            if known:
                self._cancelled.add(key)
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

    @property
    def load(self) -> dict[str, int]:
        """Requests waiting and running, and sessions kept."""
        with self._changed:
            return {"queued": len(self._queue), "active": len(self._active), "sessions": len(self._sessions)}

    def drain(self, timeout_s: float, hurry: threading.Event | None = None) -> bool:
        """Refuse new requests, wait for the accepted ones, then stop. True if all of them were answered in time.

        What is left after ``timeout_s``, or when ``hurry`` is set, ends as cancelled, with the text so far.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._draining = True
            while self._queue or self._active:
                remaining_s = deadline - time.monotonic()
                if remaining_s <= 0 or (hurry is not None and hurry.is_set()):
                    break
                self._changed.wait(min(remaining_s, _HURRY_TICK_S))
            in_time = not self._queue and not self._active
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
                if not self._queue and not self._active:
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
                if not (self._queue or self._active or self._stopping or worked or self._news):
                    self._changed.wait(due_in_s)
                self._news = False
                if self._stopping:
                    self._cancelled |= {request.key for request in self._queue}
                    self._cancelled |= {active.request.key for active in self._active}
                if self._queue or self._active or self._stopping:
                    return
            now = time.monotonic()
            self._sessions.expire(now)
            worked = self._prefetch_step()
            if trim_at is not None and now >= trim_at and not worked:
                trim_memory()
                trim_at = None

    def _prefetch_step(self) -> bool:
        try:
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
        self._caches.power.refresh()
        self._end_unwanted()
        self._admit()
        self._prefill()
        self._decode()

    def _end_unwanted(self) -> None:
        """Cancels and deadlines, for waiting and running requests alike."""
        now = time.monotonic()
        with self._changed:
            cancelled, self._cancelled = self._cancelled, set()
            removed = self._queue.remove_where(lambda request: request.key in cancelled or _expired(request, now))
        for request in removed:
            if request.key in cancelled:
                waited_ms = (now - request.received_at) * 1e3
                timing = Timing(queue_ms=waited_ms, prefill_ms=0.0, ttft_ms=None, total_ms=waited_ms)
                deliver(request, Final("", "cancelled", Usage(), timing))
            else:
                refuse(request, RequestError(408, "the deadline passed before the query could start"))
        for active in list(self._active):
            if active.request.key in cancelled:
                self._end(active, "cancelled")
            elif _expired(active.request, now):
                self._end(active, "deadline")

    def _admit(self) -> None:
        """Give free slots to waiting requests; what was only guessed makes room."""
        while True:
            with self._changed:
                running = Counter(active.request.user for active in self._active)
                request = self._queue.pop(running, self._eligible)
                if request is None:
                    return
                # Booked at once, so that a cancel which comes now finds it.
                active = ActiveRequest(request, time.monotonic(), self._answer_text)
                self._active.append(active)
            self._try_to_begin(active)

    def _book(self, request: Request) -> None:
        """Begin again with a request that had a slot."""
        active = ActiveRequest(request, time.monotonic(), self._answer_text)
        with self._changed:
            self._active.append(active)
        self._try_to_begin(active)

    def _try_to_begin(self, active: ActiveRequest) -> None:
        try:
            self._begin(active)
        except RequestError as error:
            self._drop(active)
            refuse(active.request, error)
        except Exception as fault:
            self._fail(active, fault)

    def _answer_text(self, active: ActiveRequest) -> AnswerText:
        stop = (*self._renderer.template.stop_strings, *active.request.stop)
        if self._domain is None:
            return TextStream(self._tokenizer, stop)
        return self._domain.answer(lambda: None if active.state is None else active.state.sampler, stop)

    def _eligible(self, request: Request) -> bool:
        # Turns of one session follow each other: the next prompt holds this answer.
        if request.session is not None and any(
            (active.request.user, active.request.session) == (request.user, request.session) for active in self._active
        ):
            return False
        if len(self._active) >= self._caches.power.max_active(self._engine.slots.count):
            return False
        available = self._engine.free_slots + self._prefetch.held_slots
        # Background work leaves the last slot to whoever speaks next.
        needed = 1 if request.priority == "interactive" or self._engine.slots.count == 1 else 2
        return available >= needed

    def _begin(self, active: ActiveRequest) -> None:
        request = active.request
        if self._caches.energy is not None and len(self._active) == 1:
            self._caches.energy.begin()
        if any(message.role == "system" for message in request.messages) and not self._renderer.supports_system:
            raise RequestError(400, "this model's template has no system message: put its text into the user message")
        self._sessions.expire(active.started_at)
        active.history = self._sessions.digest(request.user, request.session)
        self._prefetch.query_began(request)
        if request.session is not None and self._caches.answers is not None:
            found = self._caches.answers.find(request, active.history)
            if found is not None:
                self._end_found(active, found)
                return
        context = self._engine.max_seq_len
        # An explicit max_tokens is kept or refused; the default gives way to a long prompt.
        room = context - (request.max_tokens or 1)
        prompt_ids = self._sessions.prompt(request.user, request.session, request.messages, room, active.started_at)
        max_tokens = request.max_tokens or min(
            self._caches.power.max_tokens(self._default_max_tokens), context - len(prompt_ids)
        )
        active.started = self._prefetch.release_guess(request, room, max_tokens)
        if active.started is None:
            if not self._engine.free_slots:
                self._prefetch.give_slot()
            bypass = request.cache == "bypass"
            active.started = self._reuse.start(request.user, prompt_ids, request.sampling, max_tokens, bypass=bypass)
            return
        active.source = "prefetch"
        active.ready_len = min(active.started.state.cached_len, len(active.started.state.prompt_ids))
        if active.prefilled:
            active.first_token_at = time.monotonic()
            self._advance(active)

    def _prefill(self) -> None:
        """One chunk of the request that has waited longest for its prefill."""
        active = next((active for active in self._active if not active.prefilled), None)
        if active is None or active.state is None:
            return
        try:
            self._engine.prefill(active.state)
        except Exception as fault:
            if not self._go_on_elsewhere(fault):
                self._fail(active, fault)
            return
        if active.prefilled:
            active.first_token_at = time.monotonic()
            self._advance(active)

    def _decode(self) -> None:
        """One token for every request that has been prefilled, in one run."""
        batch = [active for active in self._active if active.prefilled]
        if not batch:
            return
        try:
            self._engine.decode([active.state for active in batch if active.state is not None])
        except Exception as fault:
            if not self._go_on_elsewhere(fault):
                for active in batch:
                    self._fail(active, fault)
            return
        for active in batch:
            self._advance(active)

    def _go_on_elsewhere(self, fault: Exception) -> bool:
        """Let another provider go on, if there is one. Answers that have begun end with 503, the others start again."""
        if self.failover is None or not self.failover.is_possible():
            return False
        interrupted = list(self._active)
        self._prefetch.close()
        for active in interrupted:
            self._drop(active, keep=False)
        self.heartbeat.excuse(_LOAD_TIMEOUT_S)
        if not self.failover.go_on(fault):
            self.failover = None
            for active in interrupted:
                refuse(active.request, _internal())
            return True
        self._prefetch.recover()
        for active in interrupted:
            if active.has_text:
                message = "the device's accelerator failed in the middle of the answer: ask again"
                refuse(active.request, RequestError(503, message, retry_after_ms=0))
            else:
                self._book(active.request)
        return True

    def _advance(self, active: ActiveRequest) -> None:
        """Deliver what is new, and end the request if its answer is complete."""
        assert active.state is not None
        if active.state.fault is not None:
            # Its sampling failed: that is this request's trouble alone.
            self._fail(active, active.state.fault)
            return
        had_text = active.has_text
        active.take_new_tokens()
        if active.has_text and not had_text:
            # The next step would take every core, and the first words would wait for one on their way through link,
            # broker and client: several milliseconds of latency for the one that this costs.
            time.sleep(_FIRST_TEXT_PAUSE_S)
        if active.text.stopped or active.state.stopped:
            self._end(active, "stop")
        elif active.state.finished:
            self._end(active, "length")

    def _end(self, active: ActiveRequest, reason: FinishReason) -> None:
        final = active.finish(reason)
        self._reuse.metrics.count("actions", len(final.actions))
        self._reuse.metrics.count("actions_dropped", final.dropped_actions)
        with _only_logged("an answer could not be remembered"):
            # Before it is delivered: it may be asked again at once.
            if self._caches.answers is not None:
                self._caches.answers.keep(active.request, final, active.history)
        self._conclude(active, final)

    def _end_found(self, active: ActiveRequest, final: Final) -> None:
        """The answer was in the response cache."""
        deliver(active.request, Delta(final.text))
        self._conclude(active, final)

    def _conclude(self, active: ActiveRequest, final: Final) -> None:
        request = active.request
        if request.session is not None and final.text:
            # What was said aloud before an interruption is part of the conversation too.
            answer = Message("assistant", final.text)
            self._sessions.add_turn(request.user, request.session, request.messages[-1], answer, time.monotonic())
        self._drop(active, keep=request.cache == "use")
        deliver(request, final)
        if self._caches.energy is not None:
            self._caches.energy.end(time.monotonic() - active.started_at, beside=len(self._active))
        if final.text:
            with _only_logged("a query could not be learnt from"):
                self._prefetch.query_ended(request)

    def _fail(self, active: ActiveRequest, fault: Exception) -> None:
        extra = {"user": active.request.user, "id": active.request.id}
        _log.error("a fault in the engine", exc_info=fault, extra=extra)
        self._drop(active, keep=False)
        refuse(active.request, _internal())

    def _fail_all(self) -> None:
        error = _internal()
        with self._changed:
            waiting = self._queue.remove_where(lambda _request: True)
        for active in list(self._active):
            self._drop(active, keep=False)
            refuse(active.request, error)
        for request in waiting:
            refuse(request, error)

    def _drop(self, active: ActiveRequest, *, keep: bool = True) -> None:
        with self._changed:
            if active in self._active:
                self._active.remove(active)
            # A cancel that came too late must not meet a later request of the same id.
            self._cancelled.discard(active.request.key)
        if active.started is not None:
            self._reuse.release(active.started, keep=keep)


@contextlib.contextmanager
def _only_logged(what: str) -> Iterator[None]:
    """What serves later queries must not cost this one, nor those beside it."""
    try:
        yield
    except Exception:
        _log.exception(what)


def _alone(request: Request) -> Request:
    """A domain model has learnt to answer one utterance; what came before it would only confuse it."""
    if any(message.role == "system" for message in request.messages):
        return request  # to be refused, not to be answered as if it had not been said
    return replace(request, session=None, messages=request.messages[-1:])


def _internal() -> RequestError:
    return RequestError(500, "a fault in the daemon; it is in the device's log")


def _expired(request: Request, now: float) -> bool:
    return request.deadline_at is not None and now >= request.deadline_at
