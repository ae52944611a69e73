"""Whole answers from the response cache: which queries may have one, and what they are filed under."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec

from edge_llm.cache.normalise import normalise
from edge_llm.cache.response_cache import CachedResponse, response_key
from edge_llm.domain.answer import ActionCall
from edge_llm.domain.schema import Kind
from edge_llm.engine.prompt import Message
from edge_llm.serving.request import Final, Timing, Usage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edge_llm.cache.response_cache import ResponseCache
    from edge_llm.serving.request import Request, Settings


class Answers:
    """Finds and keeps answers of deterministic queries. Thread-safe, as the response cache is.

    Args:
        responses: where they are kept.
    """

    def __init__(self, responses: ResponseCache) -> None:
        self._responses = responses

    def find(self, request: Request, history: bytes = b"") -> Final | None:
        """The answer to the same question with the same settings after the same ``history`` (a digest), or None."""
        if not _cacheable(request):
            return None
        found = self._responses.find(request.user, _key(request.messages, request.session, request.settings, history))
        if found is None:
            return None
        elapsed_ms = (time.monotonic() - request.received_at) * 1e3
        return Final(
            text=found.text,
            finish_reason="stop" if found.finish_reason == "stop" else "length",
            usage=Usage(found.prompt_tokens, found.prompt_tokens, None, found.completion_tokens),
            timing=Timing(queue_ms=elapsed_ms, prefill_ms=0.0, ttft_ms=elapsed_ms, total_ms=elapsed_ms),
            source="response_cache",
            kind=msgspec.convert(found.kind, Kind),
            actions=msgspec.json.decode(found.actions, type=tuple[ActionCall, ...]),
        )

    def keep(self, request: Request, final: Final, history: bytes = b"") -> None:
        """Remember a complete answer."""
        if final.finish_reason not in ("stop", "length") or not final.text or not _cacheable(request):
            return
        # A value of the moment, or an answer that lost an action.
        if final.is_volatile or final.dropped_actions:
            return
        usage = final.usage
        response = CachedResponse(
            final.text,
            final.finish_reason,
            usage.prompt_tokens,
            usage.completion_tokens,
            final.kind,
            msgspec.json.encode(final.actions),
        )
        key = _key(request.messages, request.session, request.settings, history)
        self._responses.put(request.user, key, response)

    def has(self, user: str, session: str | None, text: str, settings: Settings, history: bytes) -> bool:
        """Whether a question of one message would be found."""
        return self._responses.holds(user, _key([Message("user", text)], session, settings, history))


def _key(messages: Sequence[Message], session: str | None, settings: Settings, history: bytes) -> bytes:
    every = msgspec.to_builtins(settings.sampling)
    # None is not the default's number: it gives way to a long prompt, an explicit one is refused there.
    every["max_tokens"] = settings.max_tokens
    every["stop"] = list(settings.stop)
    every["session"] = session is not None
    said = [(message.role, message.content) for message in messages]
    return response_key(messages=said, settings=every, history=history)


def _cacheable(request: Request) -> bool:
    """Only what would be answered the same way again, and says something."""
    deterministic = request.sampling.deterministic
    return request.cache == "use" and deterministic and bool(normalise(request.messages[-1].content))
