"""One engine thread: admit → prefill a chunk → decode a batch → deliver, and again.

Requests wait in a fair queue, take a slot, are prefilled chunk by chunk, then decode together with every other active
request, one token a step. They join and leave between steps; cancels and deadlines act there too.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING

from edge_llm.device.memory import trim_memory
from edge_llm.engine.prompt import Message
from edge_llm.engine.text_stream import TextStream
from edge_llm.errors import RequestError
from edge_llm.serving.active import ActiveRequest, deliver, refuse
from edge_llm.serving.queue import FairQueue
from edge_llm.serving.request import Final, Timing, Usage
from edge_llm.serving.sessions import SessionStore, too_long

if TYPE_CHECKING:
    from edge_llm.bundle.manifest import GenerationDefaults
    from edge_llm.config import ServingConfig
    from edge_llm.engine.engine import Engine
    from edge_llm.engine.prompt import PromptRenderer
    from edge_llm.engine.tokenizer import Tokenizer
    from edge_llm.serving.request import FinishReason, Request

_log = logging.getLogger(__name__)

IDLE_TICK_S = 1.0
_HURRY_TICK_S = 0.1
_FIRST_TEXT_PAUSE_S = 0.001
# Idle for so long, the buffers that prefills have left in the C library go back to the system.
_TRIM_AFTER_S = 0.2


class Scheduler:
    """Owns the engine and the thread that runs it. ``submit``, ``cancel`` and ``drain`` may be called from any thread.

    Args:
        engine: the engine; nobody else may touch it once ``start`` has been called.
        tokenizer: decodes answers.
        renderer: encodes conversations.
        defaults: what a request that sets no ``max_tokens`` gets.
        config: the bounds.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        renderer: PromptRenderer,
        defaults: GenerationDefaults,
        config: ServingConfig,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._renderer = renderer
        self._default_max_tokens = min(defaults.max_tokens, config.max_tokens)
        self._sessions = SessionStore(
            renderer,
            # Half of the context for what was said before leaves the other half for the question and the answer.
            max_tokens=engine.max_seq_len // 2,
            idle_s=config.session_idle_s,
            max_sessions=config.max_sessions,
        )
        self._queue = FairQueue(config.max_queued, config.max_queued_per_user)
        self._active: list[ActiveRequest] = []
        self._cancelled: set[tuple[str, str]] = set()
        self._changed = threading.Condition()
        self._draining = False
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # --- from any thread -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the engine thread."""
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Queue a request. A refusal arrives through ``request.on_event``; nothing is raised."""
        try:
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

    # --- the engine thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                trimmed = False
                while not (self._queue or self._active or self._stopping):
                    woken = self._changed.wait(timeout=IDLE_TICK_S if trimmed else _TRIM_AFTER_S)
                    if not woken and not trimmed:
                        trim_memory()
                        trimmed = True
                    self._sessions.expire(time.monotonic())
                if self._stopping:
                    self._cancelled |= {request.key for request in self._queue}
                    self._cancelled |= {active.request.key for active in self._active}
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
                        return

    def _step(self) -> None:
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
        """Give free slots to waiting requests."""
        while self._engine.free_slots:
            with self._changed:
                running = Counter(active.request.user for active in self._active)
                request = self._queue.pop(running, self._eligible)
                if request is None:
                    return
                # Booked at once, so that a cancel which comes now finds it.
                stop = (*self._renderer.template.stop_strings, *request.stop)
                active = ActiveRequest(request, time.monotonic(), TextStream(self._tokenizer, stop))
                self._active.append(active)
            try:
                self._begin(active)
            except RequestError as error:
                self._drop(active)
                refuse(request, error)
            except Exception as fault:
                self._fail(active, fault)

    def _eligible(self, request: Request) -> bool:
        # Turns of one session follow each other: the next prompt holds this answer.
        if request.session is not None and any(
            (active.request.user, active.request.session) == (request.user, request.session) for active in self._active
        ):
            return False
        # Background work leaves the last slot to whoever speaks next.
        return request.priority == "interactive" or self._engine.free_slots > 1 or self._engine.runner.cache.slots == 1

    def _begin(self, active: ActiveRequest) -> None:
        request = active.request
        if any(message.role == "system" for message in request.messages) and not self._renderer.supports_system:
            raise RequestError(400, "this model's template has no system message: put its text into the user message")
        context = self._engine.max_seq_len
        # An explicit max_tokens is kept or refused; the default gives way to a long prompt.
        room = context - (request.max_tokens or 1)
        if request.session is not None:
            prompt_ids = self._sessions.prompt(request.user, request.session, request.messages, room, active.started_at)
        else:
            prompt_ids = self._renderer.encode(request.messages)
        if len(prompt_ids) > room:
            raise too_long(len(prompt_ids), room)
        max_tokens = request.max_tokens or min(self._default_max_tokens, context - len(prompt_ids))
        active.state = self._engine.start(prompt_ids, request.sampling, max_tokens)

    def _prefill(self) -> None:
        """One chunk of the request that has waited longest for its prefill."""
        active = next((active for active in self._active if not active.prefilled), None)
        if active is None or active.state is None:
            return
        try:
            self._engine.prefill(active.state)
        except Exception as fault:
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
            for active in batch:
                self._fail(active, fault)
            return
        for active in batch:
            self._advance(active)

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
        request = active.request
        if request.session is not None and final.text:
            # What was said aloud before an interruption is part of the conversation too.
            answer = Message("assistant", final.text)
            self._sessions.add_turn(request.user, request.session, request.messages[-1], answer, time.monotonic())
        self._drop(active)
        deliver(request, final)

    def _fail(self, active: ActiveRequest, fault: Exception) -> None:
        extra = {"user": active.request.user, "id": active.request.id}
        _log.error("a fault in the engine", exc_info=fault, extra=extra)
        self._drop(active)
        refuse(active.request, RequestError(500, "a fault in the daemon; it is in the device's log"))

    def _fail_all(self) -> None:
        error = RequestError(500, "a fault in the daemon; it is in the device's log")
        with self._changed:
            waiting = self._queue.remove_where(lambda _request: True)
        for active in list(self._active):
            self._drop(active)
            refuse(active.request, error)
        for request in waiting:
            refuse(request, error)

    def _drop(self, active: ActiveRequest) -> None:
        with self._changed:
            self._active.remove(active)
            # A cancel that came too late must not meet a later request of the same id.
            self._cancelled.discard(active.request.key)
        if active.state is not None:
            self._engine.release(active.state)


def _expired(request: Request, now: float) -> bool:
    return request.deadline_at is not None and now >= request.deadline_at
