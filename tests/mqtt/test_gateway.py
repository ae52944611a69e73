"""The gateway with a link that is not there: whatever comes in has one outcome."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_llm.bundle.manifest import GenerationDefaults
from edge_llm.config import Config
from edge_llm.metrics import Metrics
from edge_llm.mqtt.acks import Delivery
from edge_llm.mqtt.admission import sampling_params
from edge_llm.mqtt.gateway import Gateway
from edge_llm.mqtt.messages import Incoming, Query
from edge_llm.serving.request import Delta, Request
from tests.mqtt.fakes import FakeLink, final

NAMES = st.sampled_from(["query", "partial", "cancel", "feedback", "reply", "state", "x"])
USERS = st.sampled_from(["ann", "bob", "", "a b", "a" * 65])
JSON_QUERY = st.fixed_dictionaries(
    {},
    optional={
        "id": st.sampled_from(["a", "b"]) | st.text(max_size=70) | st.integers(),
        "text": st.text(max_size=10) | st.none(),
        "messages": st.lists(
            st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "x"]), "content": st.text(max_size=3)}),
            max_size=2,
        ),
        "supersedes": st.sampled_from(["a", "b", "c"]),
        "reply_to": st.sampled_from(["edge_llm/v1/edge/reply/ann/x", "edge_llm/v1/edge/reply/bob/x", "#", ""]),
        "max_tokens": st.integers(-1, 2000),
        "stream": st.booleans(),
        "rating": st.integers(-2, 2),
        "utterance": st.text(max_size=3),
        "seq": st.integers(-1, 3),
    },
).map(msgspec.json.encode)
MESSAGES = st.builds(
    lambda kind, user, payload, qos, retain, dup, content_type, correlation, expiry_s, response_topic: Incoming(
        topic=f"edge_llm/v1/edge/{kind}/{user}",
        payload=payload,
        received_at=0.0,
        qos=qos,
        retain=retain,
        dup=dup,
        content_type=content_type,
        correlation=correlation,
        expiry_s=expiry_s,
        response_topic=response_topic,
        delivery=Delivery(1, 1) if qos else None,
    ),
    kind=NAMES,
    user=USERS,
    payload=JSON_QUERY | st.binary(max_size=20) | st.text(max_size=20).map(str.encode),
    qos=st.integers(0, 1),
    retain=st.sampled_from([False, False, False, True]),
    dup=st.booleans(),
    content_type=st.sampled_from([None, None, "application/json", "text/plain", "image/png", "\0"]),
    correlation=st.none() | st.binary(max_size=5),
    expiry_s=st.none() | st.integers(0, 100),
    response_topic=st.sampled_from([None, "edge_llm/v1/edge/reply/ann/y", "other/topic", "+"]),
)


class EchoScheduler:
    """Answers within ``submit``."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def submit(self, request: Request) -> None:
        self.requests.append(request)
        request.on_event(Delta("a"))
        request.on_event(final("ab"))

    def cancel(self, user: str, id: str) -> bool:
        return False


def make_gateway(scheduler) -> tuple[Gateway, FakeLink, Metrics]:
    metrics = Metrics()
    gateway = Gateway(Config(), metrics)
    link = FakeLink()
    gateway.link = link  # type: ignore[assignment]
    gateway.bind(scheduler, GenerationDefaults())
    gateway.set_state("online")
    link.published.clear()
    return gateway, link, metrics


def terminals(link: FakeLink) -> list[dict]:
    return [event for event in link.events() if event.get("type") in ("final", "error")]


@settings(max_examples=300, deadline=None)
@given(st.lists(MESSAGES, min_size=1, max_size=6))
def test_every_message_has_one_outcome(messages):
    gateway, link, metrics = make_gateway(EchoScheduler())
    for message in messages:
        before = len(terminals(link))
        counters = sum(metrics.snapshot()["counters"].values())
        gateway._on_message(message)
        answered = len(terminals(link)) - before
        assert sum(metrics.snapshot()["counters"].values()) > counters
        if "/query/" in message.topic and not message.retain and message.topic.endswith(("/ann", "/bob")):
            assert answered == 1
        else:
            assert answered <= 1
        if message.delivery is not None:
            assert link.acknowledged.count(message.delivery) == 1
    assert metrics.counter("internal_errors") == 0
    for message in link.published:
        assert message.topic.startswith(("edge_llm/v1/edge/reply/ann/", "edge_llm/v1/edge/reply/bob/"))
    assert all(event.get("code") != 500 for event in link.events())


def test_a_faulty_scheduler_still_ends_the_query():
    class Faulty(EchoScheduler):
        def submit(self, request: Request) -> None:
            raise RuntimeError("no")

    gateway, link, _metrics = make_gateway(Faulty())
    gateway._on_message(Incoming("edge_llm/v1/edge/query/ann", b"hi", 0.0))
    assert [event["code"] for event in link.events()] == [500]


def test_overload_by_qos_0_is_shed():
    gateway, link, metrics = make_gateway(EchoScheduler())
    link.backlog = Config().mqtt.max_outgoing
    gateway._on_message(Incoming("edge_llm/v1/edge/query/ann", b"hi", 0.0))
    assert (link.published, metrics.counter("overload_dropped")) == ([], 1)


def test_a_query_cannot_supersede_itself():
    gateway, link, _metrics = make_gateway(EchoScheduler())
    gateway._on_message(Incoming("edge_llm/v1/edge/query/ann", b'{"id": "a", "text": "x", "supersedes": "a"}', 0.0))
    assert link.events()[0]["code"] == 400


def test_going_online_needs_a_scheduler():
    gateway = Gateway(Config(), Metrics())
    with pytest.raises(RuntimeError, match="bind"):
        gateway.set_state("online")


def test_the_bundles_defaults_fill_what_a_query_leaves_open():
    defaults = GenerationDefaults(temperature=0.7, top_k=40, top_p=0.9, min_p=0.05, repetition_penalty=1.2)
    params = sampling_params(Query(text="x"), defaults)
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0.7, 40, 0.9, 0.05)
    assert params.repetition_penalty == 1.2
    own = sampling_params(Query(text="x", temperature=0.0, top_k=0, repetition_penalty=1.0, seed=5), defaults)
    assert (own.temperature, own.top_k, own.top_p, own.repetition_penalty, own.seed) == (0.0, 0, 0.9, 1.0, 5)
