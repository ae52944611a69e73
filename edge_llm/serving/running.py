"""The queries that hold a slot: begun, prefilled chunk by chunk, decoded together, concluded.

Everything here belongs to the engine's thread, but for ``active`` and ``cancelled``, which ``changed`` guards.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from typing import TYPE_CHECKING

from edge_llm.engine.prompt import Message
from edge_llm.errors import RequestError
from edge_llm.notify import Heartbeat
from edge_llm.serving.active import ActiveRequest, deliver, refuse
from edge_llm.serving.request import Delta

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from edge_llm.engine.engine import Engine
    from edge_llm.engine.prompt import PromptRenderer
    from edge_llm.serving.active import AnswerText
    from edge_llm.serving.caches import Caches
    from edge_llm.serving.failover import Failover
    from edge_llm.serving.prefetch import Prefetcher
    from edge_llm.serving.request import Final, FinishReason, Request
    from edge_llm.serving.sessions import SessionStore

_log = logging.getLogger(__name__)

_FIRST_TEXT_PAUSE_S = 0.001
# Another provider may have to be prepared first, which takes minutes on the slowest boards.
_LOAD_TIMEOUT_S = 1800.0


class Running:
    """What runs in the slots, and how it ends.

    Args:
        engine: prefills and decodes.
        renderer: of the bundle's template.
        make_text: makes what reads an answer's tokens.
        sessions: the turns before a query.
        caches: what is remembered of earlier work.
        prefetch: what has been done ahead, and what there is to learn for it.
        default_max_tokens: of a query that names none.

    Attributes:
        active: in the order of their beginning.
        cancelled: keys of requests, queued or running, that are to end.
        changed: guards both, and is notified when there may be something to do.
        failover: goes on with another provider when this one fails; None never does.
        heartbeat: touched while the engine's thread moves.
    """

    def __init__(
        self,
        engine: Engine,
        renderer: PromptRenderer,
        make_text: Callable[[ActiveRequest], AnswerText],
        sessions: SessionStore,
        caches: Caches,
        prefetch: Prefetcher,
        default_max_tokens: int,
    ) -> None:
        self._engine = engine
        self._renderer = renderer
        self._make_text = make_text
        self._sessions = sessions
        self._caches = caches
        self._reuse = caches.reuse
        self._prefetch = prefetch
        self._default_max_tokens = default_max_tokens
        self.active: list[ActiveRequest] = []
        self.cancelled: set[tuple[str, str]] = set()
        self.changed = threading.Condition()
        self.failover: Failover | None = None
        self.heartbeat = Heartbeat()

    def book(self, request: Request) -> ActiveRequest:
        """Enter a request among the active ones; ``begin`` it next. To be called with ``changed`` held."""
        active = ActiveRequest(request, time.monotonic(), self._make_text)
        self.active.append(active)
        return active

    def begin(self, active: ActiveRequest) -> None:
        """Give a booked request its slot, or answer it at once, or refuse it."""
        try:
            self._begin(active)
        except RequestError as error:
            self._drop(active)
            refuse(active.request, error)
        except Exception as fault:
            self._fail(active, fault)

    def eligible(self, request: Request) -> bool:
        """Whether a waiting request may have a slot now."""
        # Turns of one session follow each other: the next prompt holds this answer.
        if request.session is not None and any(
            (active.request.user, active.request.session) == (request.user, request.session) for active in self.active
        ):
            return False
        if len(self.active) >= self._caches.power.max_active(self._engine.slots.count):
            return False
        available = self._engine.free_slots + self._prefetch.held_slots
        # Background work leaves the last slot to whoever speaks next.
        needed = 1 if request.priority == "interactive" or self._engine.slots.count == 1 else 2
        return available >= needed

    def _begin(self, active: ActiveRequest) -> None:
        request = active.request
        if self._caches.energy is not None and len(self.active) == 1:
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

    def prefill(self) -> None:
        """One chunk of the request that has waited longest for its prefill."""
        active = next((active for active in self.active if not active.prefilled), None)
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

    def decode(self) -> None:
        """One token for every request that has been prefilled, in one run."""
        batch = [active for active in self.active if active.prefilled]
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
        interrupted = list(self.active)
        self._prefetch.close()
        for active in interrupted:
            self._drop(active, keep=False)
        self.heartbeat.excuse(_LOAD_TIMEOUT_S)
        if not self.failover.go_on(fault):
            self.failover = None
            for active in interrupted:
                refuse(active.request, internal_error())
            return True
        self._prefetch.recover()
        for active in interrupted:
            if active.has_text:
                message = "the device's accelerator failed in the middle of the answer: ask again"
                refuse(active.request, RequestError(503, message, retry_after_ms=0))
            else:
                self._begin_again(active.request)
        return True

    def _begin_again(self, request: Request) -> None:
        with self.changed:
            active = self.book(request)
        self.begin(active)

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
            self.end(active, "stop")
        elif active.state.finished:
            self.end(active, "length")

    def end(self, active: ActiveRequest, reason: FinishReason) -> None:
        """Conclude with what has been generated."""
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
            self._caches.energy.end(time.monotonic() - active.started_at, beside=len(self.active))
        if final.text:
            with _only_logged("a query could not be learnt from"):
                self._prefetch.query_ended(request)

    def _fail(self, active: ActiveRequest, fault: Exception) -> None:
        extra = {"user": active.request.user, "id": active.request.id}
        _log.error("a fault in the engine", exc_info=fault, extra=extra)
        self._drop(active, keep=False)
        refuse(active.request, internal_error())

    def fail_all(self) -> None:
        """End everything after a fault outside of any single request."""
        for active in list(self.active):
            self._drop(active, keep=False)
            refuse(active.request, internal_error())

    def _drop(self, active: ActiveRequest, *, keep: bool = True) -> None:
        with self.changed:
            if active in self.active:
                self.active.remove(active)
            # A cancel that came too late must not meet a later request of the same id.
            self.cancelled.discard(active.request.key)
        if active.started is not None:
            self._reuse.release(active.started, keep=keep)


@contextlib.contextmanager
def _only_logged(what: str) -> Iterator[None]:
    """What serves later queries must not cost this one, nor those beside it."""
    try:
        yield
    except Exception:
        _log.exception(what)


def internal_error() -> RequestError:
    """What a query is told whose answer met a fault of ours."""
    return RequestError(500, "a fault in the daemon; it is in the device's log")
