"""A request as the scheduler sees it, and the events that it answers with.

Nothing here knows of MQTT: mqtt/gateway.py makes requests from queries and wire messages from events.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from edge_llm.domain.answer import ActionCall
from edge_llm.domain.schema import Kind
from edge_llm.engine.prompt import Message
from edge_llm.engine.sampler import SamplingParams
from edge_llm.errors import RequestError

__all__ = ["Delta", "Event", "Failed", "Final", "Message", "Request", "Settings", "Timing", "Usage"]

Priority = Literal["interactive", "background"]
FinishReason = Literal["stop", "length", "cancelled", "deadline"]
CacheUse = Literal["use", "bypass"]
Source = Literal["model", "response_cache", "prefetch"]


@dataclass(frozen=True)
class Usage:
    """Token counts of one answer. ``cached_tokens`` of the prompt needed no prefill."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    cached_from: str | None = None
    completion_tokens: int = 0


@dataclass(frozen=True)
class Timing:
    """Milliseconds since the query was read from the socket; ``ttft_ms`` is None if no text came."""

    queue_ms: float
    prefill_ms: float
    ttft_ms: float | None
    total_ms: float


@dataclass(frozen=True)
class Delta:
    """More text of the answer, whole characters only."""

    text: str


@dataclass(frozen=True)
class Final:
    """The request's one terminal event when it was answered; ``text`` is the whole answer so far.

    ``kind`` and ``actions`` come from a domain bundle. ``is_volatile`` tells that the text holds a value of the moment.
    ``dropped_actions`` counts those that the schema did not allow.
    """

    text: str
    finish_reason: FinishReason
    usage: Usage
    timing: Timing
    source: Source = "model"
    kind: Kind = "chat"
    actions: tuple[ActionCall, ...] = ()
    is_volatile: bool = False
    dropped_actions: int = 0


@dataclass(frozen=True)
class Failed:
    """The request's one terminal event when it was refused or failed."""

    error: RequestError


Event: TypeAlias = Delta | Final | Failed


@dataclass(frozen=True)
class Settings:
    """What beside its words decides how a query is answered. ``max_tokens`` None leaves it to the default."""

    sampling: SamplingParams
    max_tokens: int | None
    stop: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Request:
    """A validated query, ready for admission. Times are ``time.monotonic()`` seconds.

    Attributes:
        key: (user, id), unique among the requests in the scheduler.
        messages: the conversation to answer; with ``session`` it is the new user turn alone.
        max_tokens: the most tokens to generate; None leaves it to the bundle's default.
        stop: strings that end the answer and are not part of it.
        received_at: when the query was read from the socket: the clock of ``Timing``.
        deadline_at: when the answer is worth nothing any more, or None.
        utterance: the partials that led to it had this name.
        cache: ``bypass`` neither uses nor leaves anything in a cache.
        on_event: called from the engine thread (or from the caller of ``submit``, for a refusal or an answer that was
            kept); it must not block.
            The last call has a ``Final`` or a ``Failed``, and there is exactly one of those.
    """

    user: str
    id: str
    messages: tuple[Message, ...]
    on_event: Callable[[Event], None]
    received_at: float
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    session: str | None = None
    deadline_at: float | None = None
    priority: Priority = "interactive"
    utterance: str | None = None
    cache: CacheUse = "use"

    @property
    def settings(self) -> Settings:
        """How it wants to be answered."""
        return Settings(self.sampling, self.max_tokens, self.stop)

    @property
    def key(self) -> tuple[str, str]:
        """What cancel and supersedes name."""
        return self.user, self.id
