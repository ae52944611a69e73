"""The gateway with a link that is not there: whatever comes in has one outcome."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_llm.bundle.manifest import GenerationDefaults
from edge_llm.config import Config
from edge_llm.domain.answer import ActionCall
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


# --- values of the host ----------------------------------------------------------------------------------------------


def publish_state(gateway: Gateway, name: str, payload: bytes, *, retain: bool = True) -> Delivery:
    delivery = Delivery(1, 1)
    topic = f"edge_llm/v1/edge/state/{name}"
    gateway._on_message(Incoming(topic, payload, 0.0, qos=1, retain=retain, delivery=delivery))
    return delivery


@pytest.mark.parametrize("retain", [True, False])
def test_a_value_of_the_host_is_taken_and_nobody_is_answered(retain):
    gateway, link, metrics = make_gateway(EchoScheduler())
    delivery = publish_state(gateway, "range_km", b"312", retain=retain)
    assert gateway.state_values.get("range_km", "integer") == "312"
    assert (link.published, link.acknowledged) == ([], [delivery])
    assert (metrics.counter("state_values"), metrics.counter("retained_ignored")) == (1, 0)


def test_values_are_taken_before_a_model_is_loaded():
    gateway = Gateway(Config(), Metrics())
    gateway.link = FakeLink()  # type: ignore[assignment]
    publish_state(gateway, "range_km", b"312")
    assert gateway.state_values.get("range_km", "integer") == "312"


def test_an_empty_payload_takes_a_value_back():
    gateway, _link, metrics = make_gateway(EchoScheduler())
    publish_state(gateway, "range_km", b"312")
    publish_state(gateway, "range_km", b"")
    assert gateway.state_values.get("range_km", "integer") is None
    assert metrics.counter("state_values") == 2


@pytest.mark.parametrize(
    ("name", "payload"),
    [("range_km", b"x" * 257), ("range_km", b"[1]"), ("range_km", b"\xff"), ("a b", b"1"), ("", b"1")],
)
def test_what_is_no_value_is_refused_and_acknowledged(name, payload):
    gateway, link, metrics = make_gateway(EchoScheduler())
    publish_state(gateway, "range_km", b"312")
    delivery = publish_state(gateway, name, payload)
    assert gateway.state_values.get("range_km", "integer") == "312"
    assert (metrics.counter("state_values"), metrics.counter("state_values_refused")) == (1, 1)
    assert (link.published, link.acknowledged[-1]) == ([], delivery)


def test_values_that_nobody_asked_for_are_bounded():
    gateway, link, metrics = make_gateway(EchoScheduler())
    for number in range(300):
        publish_state(gateway, f"value_{number}", b"1")
    assert (metrics.counter("state_values"), metrics.counter("state_values_refused")) == (256, 44)
    assert len(link.acknowledged) == 300


def test_after_the_end_values_stay_with_the_broker():
    gateway, link, _metrics = make_gateway(EchoScheduler())
    gateway.set_state("offline")
    publish_state(gateway, "range_km", b"312")
    assert link.acknowledged == []


def test_kind_and_actions_leave_with_the_final_event():
    class Car(EchoScheduler):
        def submit(self, request: Request) -> None:
            action = ActionCall(name="climate.set", slots={"degrees": 21}, confidence=0.9, confirm=False)
            request.on_event(replace(final("Set to 21."), kind="command", actions=(action,), is_volatile=True))

    gateway, link, _metrics = make_gateway(Car())
    gateway._on_message(Incoming("edge_llm/v1/edge/query/ann", b"make it 21", 0.0))
    (event,) = link.events()
    assert event["kind"] == "command"
    assert event["actions"] == [{"name": "climate.set", "slots": {"degrees": 21}, "confidence": 0.9, "confirm": False}]
    assert "is_volatile" not in event


def test_a_model_that_just_writes_has_no_actions():
    gateway, link, _metrics = make_gateway(EchoScheduler())
    gateway._on_message(Incoming("edge_llm/v1/edge/query/ann", b"hi", 0.0))
    event = link.events()[-1]
    assert (event["kind"], event["actions"]) == ("chat", [])
