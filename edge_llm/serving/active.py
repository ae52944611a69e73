"""A request that has a slot: its engine state, its text, its clock."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, TypeAlias

from edge_llm.domain.answer import DomainAnswer
from edge_llm.engine.text_stream import TextStream
from edge_llm.serving.request import Delta, Event, Failed, Final, Timing, Usage

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge_llm.cache.reuse import Started
    from edge_llm.engine.engine import GenerationState
    from edge_llm.errors import RequestError
    from edge_llm.serving.request import FinishReason, Request, Source

_log = logging.getLogger(__name__)

AnswerText: TypeAlias = TextStream | DomainAnswer


class ActiveRequest:
    """Joins a request with its sequence. Times are ``time.monotonic()`` seconds.

    ``source`` is ``prefetch`` if the sequence was begun before the query came, and ``ready_len`` how much of the prompt
    had been prefilled by then; ``history`` is the digest of its session as it was when the query began.

    Args:
        request: what was asked.
        started_at: when it left the queue.
        make_text: makes what reads the answer's tokens.
    """

    def __init__(self, request: Request, started_at: float, make_text: Callable[[ActiveRequest], AnswerText]) -> None:
        self.request = request
        self.started_at = started_at
        self.started: Started | None = None
        self.source: Source = "model"
        self.history = b""
        self.ready_len = 0
        self.text = make_text(self)
        self.first_token_at: float | None = None
        self._first_text_at: float | None = None
        self._taken = 0

    @property
    def state(self) -> GenerationState | None:
        """The sequence, once it has a slot."""
        return None if self.started is None else self.started.state

    @property
    def prefilled(self) -> bool:
        """It is ready to decode."""
        return self.state is not None and self.state.prefilled

    @property
    def has_text(self) -> bool:
        """Some of the answer's text has been delivered."""
        return self._first_text_at is not None

    def take_new_tokens(self) -> None:
        """Turn the state's new tokens into text and deliver what is certain."""
        assert self.state is not None
        text = ""
        # One by one, as if they had just been generated: a stop string ends the answer where it would have then.
        for token_id in self.state.output_ids[self._taken :]:
            text += self.text.push([token_id])
            self._taken += 1
            if self.text.stopped:
                del self.state.output_ids[self._taken :]
                break
        self._emit(text)

    def finish(self, reason: FinishReason) -> Final:
        """The terminal event, after the text that was held back."""
        domain = self.text if isinstance(self.text, DomainAnswer) else None
        completed = reason in ("stop", "length")
        # Somebody who takes a command back, or for whom it comes too late, does not want its actions.
        if domain is None or completed:
            self._emit(self.text.finish())
        now = time.monotonic()
        received_at = self.request.received_at
        prefill_end = self.first_token_at or now
        return Final(
            text=self.text.text,
            finish_reason=reason,
            usage=self._usage(),
            timing=Timing(
                queue_ms=(self.started_at - received_at) * 1e3,
                prefill_ms=(prefill_end - self.started_at) * 1e3,
                ttft_ms=None if self._first_text_at is None else (self._first_text_at - received_at) * 1e3,
                total_ms=(now - received_at) * 1e3,
            ),
            source=self.source,
            kind="chat" if domain is None else domain.kind,
            actions=domain.actions if domain is not None and completed else (),
            is_volatile=domain is not None and domain.is_volatile,
            dropped_actions=0 if domain is None else domain.dropped_actions,
        )

    def _usage(self) -> Usage:
        if self.started is None:
            return Usage()
        state = self.started.state
        prompt_tokens = len(state.prompt_ids)
        if self.source == "prefetch":
            return Usage(prompt_tokens, self.ready_len, "partial", len(state.output_ids))
        cached_from = self.started.cached_from if state.reused_len else None
        return Usage(prompt_tokens, state.reused_len, cached_from, len(state.output_ids))

    def _emit(self, text: str) -> None:
        if not text:
            return
        if self._first_text_at is None:
            self._first_text_at = time.monotonic()
        deliver(self.request, Delta(text))


def deliver(request: Request, event: Event) -> None:
    """Hand an event to the request's owner, whose trouble must not end the engine thread."""
    try:
        request.on_event(event)
    except Exception:
        _log.exception("an event could not be delivered", extra={"user": request.user, "id": request.id})


def refuse(request: Request, error: RequestError) -> None:
    """End a request with an error."""
    deliver(request, Failed(error))
