"""From a checked query to a scheduler's request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import msgspec

from edge_llm.engine.sampler import SamplingParams
from edge_llm.serving.request import Final, Message, Request, Timing, Usage

if TYPE_CHECKING:
    from edge_llm.bundle.manifest import GenerationDefaults
    from edge_llm.mqtt.messages import Query
    from edge_llm.mqtt.replies import Reply


class Scheduler(Protocol):
    """What the gateway needs of serving/scheduler.py. The calls are thread-safe and do not block."""

    def submit(self, request: Request) -> None:
        """Take a request. A refusal comes through ``request.on_event`` as ``Failed``; nothing is raised."""

    def cancel(self, user: str, request_id: str, /) -> bool:
        """End a queued or running request as cancelled. False if there is none of that user and id."""

    def partial(self, user: str, utterance: str, seq: int, text: str, session: str | None) -> bool:
        """Take a transcript that is still growing. False if it is stale."""


@dataclass(frozen=True)
class Admitted:
    """A query that will be answered. Times are ``time.monotonic()`` seconds."""

    user: str
    id: str
    query: Query
    reply: Reply
    received_at: float
    deadline_at: float | None

    def request(self, defaults: GenerationDefaults) -> Request:
        """For the scheduler: what the query leaves open comes from the bundle."""
        query = self.query
        if query.messages is not None:
            messages = tuple(Message(message.role, message.content) for message in query.messages)
        else:
            messages = (Message("user", query.text or ""),)
        return Request(
            user=self.user,
            id=self.id,
            messages=messages,
            on_event=self.reply.on_event,
            received_at=self.received_at,
            sampling=sampling_params(query, defaults),
            max_tokens=query.max_tokens,
            stop=query.stop,
            session=query.session,
            deadline_at=self.deadline_at,
            priority=query.priority,
            utterance=query.utterance,
            cache=query.cache,
        )

    def cancelled(self, now: float) -> Final:
        """The terminal event of a query that was cancelled before the scheduler had it."""
        waited_ms = (now - self.received_at) * 1000
        return Final("", "cancelled", Usage(), Timing(waited_ms, 0.0, None, waited_ms))


def sampling_params(query: Query, defaults: GenerationDefaults) -> SamplingParams:
    """The query's own settings over the bundle's."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    own = {name: value for name in names if (value := getattr(query, name)) is not None}
    return msgspec.structs.replace(SamplingParams.from_defaults(defaults), **own)
