"""The client library against a gateway on a real broker."""

from __future__ import annotations

import pytest

from edge_llm.config import MqttConfig
from edge_llm.errors import ConfigError, RequestError
from edge_llm.mqtt.asking import AnswerTimeoutError, Asker, BrokerUnreachableError, DaemonOfflineError
from tests.brokers import free_port, wait_for
from tests.mqtt.fakes import WAIT_S, Relay, RunningGateway

pytestmark = pytest.mark.broker
BOTH = pytest.mark.parametrize("protocol", ["5", "3.1.1"])


@BOTH
def test_ask_streams_and_returns_the_final(mosquitto, protocol):
    config = MqttConfig(port=mosquitto.port, protocol=protocol)
    with RunningGateway(mosquitto.port) as running, Asker(config, user="ann") as asker:
        assert asker.wait_online(WAIT_S)["node"] == "edge"
        deltas: list[str] = []
        answer = asker.ask("say one two", on_delta=deltas.append, id="mine", max_tokens=5)
        assert (answer["id"], answer["text"]) == ("mine", "one two")
        assert deltas == ["one ", "two "]
        assert running.scheduler.next().max_tokens == 5
        asker.rate("mine", 1)
        wait_for(lambda: running.metrics.counter("feedback_good") == 1, WAIT_S)


@BOTH
def test_errors_are_raised_with_their_code(mosquitto, protocol):
    with RunningGateway(mosquitto.port), Asker(MqttConfig(port=mosquitto.port, protocol=protocol)) as asker:
        with pytest.raises(RequestError, match="unknown field `tempo`") as raised:
            asker.ask("say hi", tempo=1)
        assert raised.value.code == 400


@BOTH
def test_cancel_and_early_leave(mosquitto, protocol):
    config = MqttConfig(port=mosquitto.port, protocol=protocol)
    with RunningGateway(mosquitto.port) as running, Asker(config) as asker:
        query_id = asker.send("wait first")
        events = asker.events(query_id, timeout_s=WAIT_S)
        assert next(events)["text"] == "first"
        asker.cancel(query_id)
        assert next(events)["finish_reason"] == "cancelled"
        assert list(events) == []
        stream = asker.stream("wait second", id="left")
        next(stream)
        stream.close()
        wait_for(lambda: running.metrics.counter("finals_cancelled") == 2, WAIT_S)


def test_silence_times_out_and_cancels(mosquitto):
    with RunningGateway(mosquitto.port) as running, Asker(MqttConfig(port=mosquitto.port)) as asker:
        with pytest.raises(AnswerTimeoutError):
            asker.ask("wait", timeout_s=0.2)
        wait_for(lambda: running.metrics.counter("finals_cancelled") == 1, WAIT_S)


@BOTH
def test_an_answer_is_found_again_after_a_lost_connection(mosquitto, protocol):
    relay = Relay(mosquitto.port)
    config = MqttConfig(port=relay.port, protocol=protocol, reconnect_min_s=0.02, reconnect_max_s=0.1)
    with RunningGateway(mosquitto.port) as running, Asker(config) as asker:
        query_id = asker.send("wait piece")
        events = asker.events(query_id, timeout_s=WAIT_S)
        assert next(events)["type"] == "delta"
        relay.cut(for_good=True)
        running.scheduler.finish("cli", query_id)
        wait_for(lambda: running.metrics.counter("finals_stop") == 1, WAIT_S)
        relay.allow()
        assert next(events)["text"] == "done"
        assert running.scheduler.count == 1
    relay.close()


def test_what_is_wrong_is_said(mosquitto):
    with pytest.raises(BrokerUnreachableError, match="Connection refused"):
        Asker(MqttConfig(port=free_port())).connect(0.5)
    with pytest.raises(ConfigError, match="user"):
        Asker(MqttConfig(), user="not a name")
    with Asker(MqttConfig(port=mosquitto.port)) as asker, pytest.raises(DaemonOfflineError, match="no daemon"):
        asker.wait_online(0.2)
    with RunningGateway(mosquitto.port, online=False), Asker(MqttConfig(port=mosquitto.port)) as asker:
        # The status may still be on its way to the broker when the asker subscribes.
        wait_for(lambda: bool(asker._statuses), WAIT_S)
        with pytest.raises(DaemonOfflineError, match="is loading"):
            asker.wait_online(0.05)


def test_asking_over_iotcore(iotcore):
    with RunningGateway(iotcore.port), Asker(MqttConfig(port=iotcore.port)) as asker:
        asker.wait_online(WAIT_S)
        assert asker.protocol == "5"
        assert asker.ask("say over rumqttd", timeout_s=WAIT_S)["text"] == "over rumqttd"
        query_id = asker.send("wait piece")
        events = asker.events(query_id, timeout_s=WAIT_S)
        next(events)
        asker.cancel(query_id)
        assert next(events)["finish_reason"] == "cancelled"
