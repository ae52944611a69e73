"""From the scheduler's events to the wire's, with a link that is not there."""

from __future__ import annotations

import pytest

from edge_llm.errors import RequestError
from edge_llm.mqtt.acks import Delivery
from edge_llm.mqtt.replies import Address, Reply, ReplySettings
from edge_llm.serving.request import Delta, Failed
from tests.mqtt.fakes import FakeLink, final

PHONE, DESK = Address("edge_llm/v1/edge/reply/ann/phone", b"c"), Address("edge_llm/v1/edge/reply/ann/desk")


def make(
    link: FakeLink, *, stream: bool = True, delta_interval_ms: float = 0.0, terminals: list | None = None
) -> Reply:
    settings = ReplySettings("edge", stream, delta_interval_ms)
    terminals = [] if terminals is None else terminals
    return Reply("q", settings, link, on_delta=lambda _sent: None, on_terminal=terminals.append)


def test_the_first_text_goes_at_once_and_the_rest_is_gathered():
    link = FakeLink()
    reply = make(link, delta_interval_ms=60_000)
    reply.attach(PHONE, None)
    for piece in "abc":
        reply.on_event(Delta(piece))
    reply.on_event(final("abc"))
    assert [(event["type"], event["seq"], event["text"]) for event in link.events()] == [
        ("delta", 0, "a"),
        ("final", 1, "abc"),
    ]
    assert [message.qos for message in link.published] == [0, 1]
    assert {message.correlation for message in link.published} == {b"c"}


def test_refused_deltas_leave_no_gap_and_lose_no_text():
    link = FakeLink()
    reply = make(link)
    reply.attach(PHONE, None)
    reply.on_event(Delta("a"))
    link.refuse_deltas = True
    reply.on_event(Delta("b"))
    reply.on_event(Delta("c"))
    link.refuse_deltas = False
    reply.on_event(Delta("d"))
    reply.on_event(final("abcd"))
    assert [(event["seq"], event["text"]) for event in link.events()] == [(0, "a"), (1, "bcd"), (2, "abcd")]


def test_without_streaming_there_is_the_end_only():
    link = FakeLink()
    reply = make(link, stream=False)
    reply.attach(PHONE, None)
    reply.on_event(Delta("a"))
    reply.on_event(final("a"))
    assert [event["type"] for event in link.events()] == ["final"]


def test_the_query_is_acknowledged_when_its_terminal_event_is():
    link = FakeLink(confirm=False)
    first, copy, elsewhere, late = (Delivery(1, mid) for mid in range(4))
    reply = make(link)
    reply.attach(PHONE, first)
    reply.attach(PHONE, copy)
    reply.attach(DESK, elsewhere)
    reply.on_event(final("a"))
    assert [message.topic for message in link.published] == [PHONE.topic, DESK.topic]
    reply.attach(PHONE, late)  # its terminal event is on the way already
    assert len(link.published) == 2
    assert link.acknowledged == []
    link.confirm_all()
    assert link.acknowledged == [first, copy, late, elsewhere]
    again = Delivery(1, 5)
    reply.attach(PHONE, again)
    assert link.events()[-1] == link.events()[0]
    link.confirm_all()
    assert link.acknowledged[-1] is again


def test_a_second_terminal_event_is_dropped():
    link = FakeLink()
    terminals: list = []
    reply = make(link, terminals=terminals)
    reply.attach(PHONE, None)
    reply.on_event(Failed(RequestError(429, "full", retry_after_ms=50)))
    reply.on_event(final("a"))
    assert len(terminals) == len(link.published) == 1
    assert link.events()[0] == {
        "type": "error", "v": 1, "id": "q", "node": "edge", "seq": 0, "code": 429, "name": "busy",
        "message": "full", "retriable": True, "retry_after_ms": 50,
    }  # fmt: skip


def test_the_places_of_one_answer_are_bounded():
    reply = make(FakeLink())
    for n in range(16):
        reply.attach(Address(f"topic/{n}"), None)
    with pytest.raises(RequestError) as raised:
        reply.attach(Address("topic/16"), None)
    assert raised.value.code == 429
