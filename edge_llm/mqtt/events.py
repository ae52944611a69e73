"""What goes over the wire: the events that answer a query. docs/contract.md describes every field."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from edge_llm.domain.answer import ActionCall
from edge_llm.domain.schema import Kind
from edge_llm.errors import RequestError
from edge_llm.serving.request import Final as FinalAnswer

CONTRACT_VERSION: Final = 1
CONTENT_TYPE: Final = "application/json"


class _Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """The fields of every event; ``seq`` counts the events of one query from 0."""

    v: int = CONTRACT_VERSION
    id: str
    node: str
    seq: int


class DeltaEvent(_Event, frozen=True, kw_only=True, tag="delta"):
    """More text."""

    text: str


class UsageField(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts."""

    prompt_tokens: int
    cached_tokens: int
    cached_from: str | None
    completion_tokens: int


class TimingField(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds since the query was read from the socket."""

    queue_ms: float
    prefill_ms: float
    ttft_ms: float | None
    total_ms: float


class FinalEvent(_Event, frozen=True, kw_only=True, tag="final"):
    """The whole answer."""

    text: str
    finish_reason: str
    usage: UsageField
    timing: TimingField
    source: str
    kind: Kind = "chat"
    actions: tuple[ActionCall, ...] = ()


class ErrorEvent(_Event, frozen=True, kw_only=True, tag="error"):
    """Why there is no answer."""

    code: int
    name: str
    message: str
    retriable: bool
    retry_after_ms: int | None


def encode_delta(query_id: str, node: str, seq: int, text: str) -> bytes:
    """A ``delta`` event."""
    return msgspec.json.encode(DeltaEvent(id=query_id, node=node, seq=seq, text=text))


def encode_final(query_id: str, node: str, seq: int, answer: FinalAnswer) -> bytes:
    """A ``final`` event."""
    usage, timing = answer.usage, answer.timing
    event = FinalEvent(
        id=query_id,
        node=node,
        seq=seq,
        text=answer.text,
        finish_reason=answer.finish_reason,
        usage=UsageField(
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            cached_from=usage.cached_from,
            completion_tokens=usage.completion_tokens,
        ),
        timing=TimingField(
            queue_ms=round(timing.queue_ms, 3),
            prefill_ms=round(timing.prefill_ms, 3),
            ttft_ms=None if timing.ttft_ms is None else round(timing.ttft_ms, 3),
            total_ms=round(timing.total_ms, 3),
        ),
        source=answer.source,
        kind=answer.kind,
        actions=answer.actions,
    )
    return msgspec.json.encode(event)


def encode_error(query_id: str, node: str, seq: int, error: RequestError) -> bytes:
    """An ``error`` event."""
    event = ErrorEvent(
        id=query_id,
        node=node,
        seq=seq,
        code=error.code,
        name=error.name,
        message=error.message,
        retriable=error.retriable,
        retry_after_ms=error.retry_after_ms,
    )
    return msgspec.json.encode(event)


def encode_status(node: str, state: str, detail: dict[str, Any]) -> bytes:
    """The retained status of a node. ``detail`` adds fields and cannot replace these."""
    return msgspec.json.encode({**detail, "v": CONTRACT_VERSION, "node": node, "state": state})
