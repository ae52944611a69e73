"""The contract over a real mosquitto, in MQTT 5 and 3.1.1."""

from __future__ import annotations

import re

import msgspec
import pytest

from tests.brokers import Mosquitto, wait_for
from tests.mqtt.fakes import WAIT_S, RunningGateway, Wire

pytestmark = pytest.mark.broker
BOTH = pytest.mark.parametrize("protocol", ["5", "3.1.1"])


@BOTH
def test_a_query_streams_and_ends(mosquitto, protocol):
    with RunningGateway(mosquitto.port, protocol=protocol), Wire(mosquitto.port, protocol) as wire:
        wire.ask({"id": "q1", "text": "say one two three", "max_tokens": 9})
        events = wire.events("q1")
        assert [event["type"] for event in events] == ["delta", "delta", "delta", "final"]
        assert [event["seq"] for event in events] == [0, 1, 2, 3]
        assert all(event["v"] == 1 and event["node"] == "edge" for event in events)
        assert "".join(event["text"] for event in events[:-1]).strip() == events[-1]["text"] == "one two three"
        last = events[-1]
        assert last["finish_reason"] == "stop"
        assert last["usage"] == {"prompt_tokens": 3, "cached_tokens": 0, "cached_from": None, "completion_tokens": 3}
        assert last["timing"] == {"queue_ms": 0.5, "prefill_ms": 1.0, "ttft_ms": 2.0, "total_ms": 3.0}
        assert (last["source"], last["kind"], last["actions"]) == ("model", "chat", [])


def test_mqtt5_properties_serve_for_the_fields(mosquitto):
    with RunningGateway(mosquitto.port) as running, Wire(mosquitto.port) as wire:
        wire.ask(
            "say hi",
            ResponseTopic="edge_llm/v1/edge/reply/ann/phone",
            CorrelationData=b"turn-7",
            MessageExpiryInterval=30,
            ContentType="text/plain; charset=UTF-8",
        )
        request = running.scheduler.next()
        assert request.id == "turn-7"
        assert request.deadline_at is not None
        assert 25 < request.deadline_at - request.received_at <= 30
        message = wire.find(lambda m: b'"final"' in m.payload)
        assert message.topic == "edge_llm/v1/edge/reply/ann/phone"
        assert message.correlation == b"turn-7"
        assert message.content_type == "application/json"


@BOTH
def test_query_fields_reach_the_scheduler(mosquitto, protocol):
    with RunningGateway(mosquitto.port, protocol=protocol) as running, Wire(mosquitto.port, protocol) as wire:
        wire.ask(
            {
                "id": "q",
                "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "say yes"}],
                "stream": False,
                "max_tokens": 5,
                "temperature": 0.5,
                "top_k": 7,
                "top_p": 0.9,
                "min_p": 0.1,
                "repetition_penalty": 1.1,
                "seed": 3,
                "stop": ["\n"],
                "deadline_ms": 60000,
                "priority": "background",
                "cache": "bypass",
            }
        )
        request = running.scheduler.next()
        assert [message.role for message in request.messages] == ["system", "user"]
        assert (request.max_tokens, request.stop, request.priority) == (5, ("\n",), "background")
        assert (request.sampling.temperature, request.sampling.top_k, request.sampling.seed) == (0.5, 7, 3)
        assert request.deadline_at == pytest.approx(request.received_at + 60)
        assert [event["type"] for event in wire.events("q")] == ["final"]


@BOTH
@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"\xff\xfe", 400),
        (b"{", 400),
        (b'{"text": NaN}', 400),
        ('{"text":' + "[" * 5000 + "]" * 5000 + "}", 400),
        ({"text": "hi", "tempo": 1}, 400),
        ({"text": ""}, 400),
        ({"text": "hi", "temperature": 9}, 400),
        ({"text": "hi", "messages": [{"role": "user", "content": "hi"}]}, 400),
        ({"text": "hi", "max_tokens": 100_000}, 400),
        ({"text": "hi", "reply_to": "edge_llm/v1/edge/reply/bob/phone"}, 403),
        ({"text": "hi", "reply_to": "edge_llm/v1/edge/query/ann"}, 403),
        ({"text": "hi", "reply_to": "edge_llm/v1/edge/reply/ann/+"}, 403),
        ({"text": "hi", "supersedes": "never-asked"}, 404),
        ({"text": "fail 408"}, 408),
        ({"text": "x" * 70_000}, 413),
        ({"text": "fail 413"}, 413),
        ({"text": "fail 429"}, 429),
        ({"text": "fail 500"}, 500),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_bad_query_gets_its_error(mosquitto, protocol, body, code):
    with RunningGateway(mosquitto.port, protocol=protocol) as running, Wire(mosquitto.port, protocol) as wire:
        wire.ask(body)
        event = wire.terminal()
        assert (event["type"], event["code"], event["seq"]) == ("error", code, 0)
        assert event["topic"] == "edge/reply/ann/default"
        assert event["retriable"] is (code in (429, 500, 503))
        assert wire.nothing_more_than() == []
        # It was acknowledged too: nothing is left for the broker to deliver again.
        wait_for(lambda: _outstanding(mosquitto, "edge_llm-edge") == 0, WAIT_S)
        assert running.metrics.counter("internal_errors") == 0


def _outstanding(broker: Mosquitto, client_id: str) -> int:
    log = broker.log()
    sent = len(re.findall(rf"Sending PUBLISH to {client_id} \(d0, q1", log))
    return sent - len(re.findall(rf"Received PUBACK from {client_id} ", log))


def test_an_unsupported_content_type_is_415(mosquitto):
    with RunningGateway(mosquitto.port), Wire(mosquitto.port) as wire:
        wire.ask(b"<q/>", ContentType="application/xml", CorrelationData=b"\x00\x01")
        event = wire.terminal()
        assert (event["code"], event["name"], event["id"]) == (415, "unsupported_content_type", "0001")


@BOTH
def test_not_ready_is_503(mosquitto, protocol):
    with (
        RunningGateway(mosquitto.port, online=False, protocol=protocol) as running,
        Wire(mosquitto.port, protocol) as wire,
    ):
        assert wire.status("loading")
        wire.ask({"id": "early", "text": "say hi"})
        event = wire.terminal("early")
        assert (event["code"], event["retriable"]) == (503, True)
        assert event["retry_after_ms"] > 0
        running.gateway.set_state("online")
        wire.ask({"id": "early", "text": "say hi"})  # the retry is the same message, and must run
        assert wire.terminal("early")["type"] == "final"
        running.gateway.set_state("draining")
        wire.ask({"id": "late", "text": "say hi"})
        assert wire.terminal("late")["code"] == 503


@BOTH
def test_a_repeated_query_runs_once(mosquitto, protocol):
    with RunningGateway(mosquitto.port, protocol=protocol) as running, Wire(mosquitto.port, protocol) as wire:
        body = {"id": "q", "text": "wait"}
        wire.ask(body)
        running.scheduler.next()
        wire.ask(body)  # while it runs
        wire.ask({"id": "q", "text": "something else"})
        assert wire.terminal("q")["code"] == 409
        running.scheduler.finish("ann", "q")
        first = wire.terminal("q")
        wire.ask(body)  # after it ran
        assert wire.terminal("q") == first
        assert wire.nothing_more_than() == []
        assert running.scheduler.count == 2  # with the barrier
        wire.ask(body, user="bob")  # another user's id is another id
        assert running.scheduler.next("bob")
        running.scheduler.finish("bob", "q")
        assert wire.terminal("q")["topic"] == "edge/reply/bob/default"


@BOTH
@pytest.mark.parametrize("payload", [{"id": "q"}, "q\n"], ids=["json", "bare"])
def test_cancel_ends_its_own_query_only(mosquitto, protocol, payload):
    with RunningGateway(mosquitto.port, protocol=protocol) as running, Wire(mosquitto.port, protocol) as wire:
        for user in ("ann", "bob"):
            wire.ask({"id": "q", "text": "wait"}, user=user)
            running.scheduler.next()
        wire.send("edge/cancel/ann", payload)
        event = wire.terminal("q")
        assert (event["topic"], event["finish_reason"]) == ("edge/reply/ann/default", "cancelled")
        wire.send("edge/cancel/ann", payload)  # too late, but it is known: no second terminal event
        wire.send("edge/cancel/ann", {"id": "never-asked"})
        assert wire.terminal()["code"] == 404
        running.scheduler.finish("bob", "q")
        assert wire.terminal("q")["finish_reason"] == "stop"


@BOTH
def test_supersedes_cancels_and_runs(mosquitto, protocol):
    with RunningGateway(mosquitto.port, protocol=protocol) as running, Wire(mosquitto.port, protocol) as wire:
        wire.ask({"id": "old", "text": "wait"})
        running.scheduler.next()
        wire.ask({"id": "new", "text": "say better", "supersedes": "old"})
        assert wire.terminal("old")["finish_reason"] == "cancelled"
        assert wire.terminal("new")["text"] == "better"
        wire.ask({"id": "newer", "text": "say best", "supersedes": "new"})  # it has finished already: no error
        assert wire.terminal("newer")["text"] == "best"


@BOTH
def test_feedback_needs_a_finished_answer(mosquitto, protocol):
    with RunningGateway(mosquitto.port, protocol=protocol) as running, Wire(mosquitto.port, protocol) as wire:
        wire.ask({"id": "q", "text": "say hi"})
        wire.terminal("q")
        wire.send("edge/feedback/ann", {"id": "q", "rating": -1, "correction": "hello"})
        wire.send("edge/feedback/ann", {"id": "other", "rating": 1})
        assert wire.terminal("other")["code"] == 404
        wire.send("edge/feedback/ann", {"id": "q", "rating": 2})
        assert wire.terminal("q")["code"] == 400
        assert running.metrics.counter("feedback_bad") == 1


def test_partials_are_counted_and_never_answered(mosquitto):
    with RunningGateway(mosquitto.port) as running, Wire(mosquitto.port) as wire:
        wire.send("edge/partial/ann", {"utterance": "u", "seq": 0, "text": "what is"}, qos=0)
        wire.send("edge/partial/ann", {"utterance": "u"}, qos=0)
        wire.send("edge/partial/ann", "what", qos=0)
        assert wire.nothing_more_than() == []
        assert running.metrics.counter("partials_accepted") == 1
        assert running.metrics.counter("partials_refused") == 2


@BOTH
def test_what_cannot_be_answered_is_counted(mosquitto, protocol):
    with Wire(mosquitto.port, protocol) as wire:
        wire.ask({"id": "kept", "text": "say hi"}, retain=True)
        with RunningGateway(mosquitto.port, protocol=protocol) as running:
            wire.ask({"id": "nobody", "text": "say hi"}, user="no body")
            wire.ask({"id": "fine", "text": "say hi"}, qos=0)
            assert wire.events("fine")[-1]["type"] == "final"
            assert wire.nothing_more_than() == []
            assert running.metrics.counter("unroutable") == 1
            # In MQTT 5 the subscription asks for no retained messages at all.
            assert running.metrics.counter("retained_ignored") == (0 if protocol == "5" else 1)


def test_acknowledgements_follow_the_answers_in_order_of_receipt(mosquitto):
    with RunningGateway(mosquitto.port) as running, Wire(mosquitto.port) as wire:
        wire.ask({"id": "slow", "text": "wait"})
        running.scheduler.next()
        wire.ask({"id": "quick", "text": "say hi"})
        wire.terminal("quick")
        wire.nothing_more_than()
        assert "Received PUBACK from edge_llm-edge" not in mosquitto.log()
        running.scheduler.finish("ann", "slow")
        wire.terminal("slow")
        pattern = re.compile(r"Received PUBACK from edge_llm-edge \(Mid: (\d+)")
        wait_for(lambda: len(pattern.findall(mosquitto.log())) == 3, WAIT_S)
        assert pattern.findall(mosquitto.log()) == re.findall(
            r"Sending PUBLISH to edge_llm-edge \(d0, q1, r0, m(\d+)", mosquitto.log()
        )


@BOTH
def test_status_info_metrics_and_will(mosquitto, protocol):
    serving = {"metrics_interval_s": 0.05}
    with RunningGateway(mosquitto.port, protocol=protocol, serving=serving) as running:
        with Wire(mosquitto.port, protocol) as wire:
            running.gateway.publish_info({"bundle": "tiny"})
            wire.find(lambda m: m.topic.endswith("/info"))
        with Wire(mosquitto.port, protocol) as wire:
            assert wire.status("online")["v"] == 1
            info = wire.find(lambda m: m.topic.endswith("/info"))
            assert info.retain
            assert msgspec.json.decode(info.payload) == {"v": 1, "node": "edge", "bundle": "tiny"}
            wire.ask({"id": "q", "text": "say hi"})
            wire.terminal("q")
            metrics = wire.find(lambda m: m.topic.endswith("/metrics") and b"finals_stop" in m.payload)
            latency = msgspec.json.decode(metrics.payload)["latency"]
            assert {"queue_ms", "prefill_ms", "ttft_ms", "total_ms", "publish_lag_ms"} <= latency.keys()
            running.gateway.set_state("draining", left=1)
            assert wire.status("draining")["left"] == 1
            running.gateway.close(2.0)
            assert wire.status("offline")


def test_the_session_survives_a_clean_stop(mosquitto):
    with RunningGateway(mosquitto.port):
        pass
    with Wire(mosquitto.port) as wire:
        wire.ask({"id": "meanwhile", "text": "say welcome back"})
        with RunningGateway(mosquitto.port, online=False) as running:
            # It was never delivered before, so nothing promised it an answer while the model loads.
            assert wire.terminal("meanwhile")["code"] == 503
            assert running.metrics.counter("connections") == 1
