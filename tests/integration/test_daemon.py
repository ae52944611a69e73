"""The daemon as its users meet it: a process, a real broker, a real model (small)."""

from __future__ import annotations

import ctypes
import json
import platform
import signal
import threading
from collections import Counter
from pathlib import Path

import paho.mqtt.client as mqtt
import pytest

from edge_llm.bundle.manifest import Bundle
from edge_llm.config import Config, EngineConfig
from edge_llm.engine.loading import load_model
from edge_llm.engine.prompt import Message
from edge_llm.errors import RequestError
from edge_llm.mqtt.asking import DaemonOfflineError
from tests.brokers import wait_for, wait_offline
from tests.paths import TINY_BUNDLE

pytestmark = pytest.mark.broker
WAIT_S = 30


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What the engine answers in this process: the daemon must say the same."""
    config = Config(cache_dir=str(tmp_path_factory.mktemp("cache")), engine=EngineConfig(threads=1))
    model = load_model(Bundle.open(TINY_BUNDLE), config)

    def answer(*contents: str, max_tokens: int = 32) -> str:
        roles = ["user", "assistant"] * len(contents)
        messages = [Message(role, content) for role, content in zip(roles, contents, strict=False)]
        token_ids = list(model.engine.generate(model.renderer.encode(messages), max_tokens=max_tokens))
        return model.tokenizer.decode(token_ids).removesuffix("\ufffd")

    return answer


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_query_is_answered_as_the_engine_answers(mosquitto, start_daemon, connect, expected, protocol):
    start_daemon(mosquitto.port)
    asker = connect(mosquitto.port, mqtt={"protocol": protocol})
    deltas: list[str] = []
    final = asker.ask("What is MQTT?", on_delta=deltas.append)
    assert final["text"] == expected("What is MQTT?")
    assert final["text"].startswith("".join(deltas))
    assert deltas
    assert final["usage"]["completion_tokens"] > 0
    assert final["source"] == "model"


def test_the_demo_path_over_iotcore(iotcore, start_daemon, connect, expected):
    start_daemon(iotcore.port)
    assert connect(iotcore.port).ask("hello")["text"] == expected("hello")


class TerminalEvents:
    """Counts every terminal event on the wire, whoever waits for it."""

    def __init__(self, port: int) -> None:
        self.by_query: Counter[tuple[str, str]] = Counter()
        subscribed = threading.Event()
        self._client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
        self._client.on_message = self._count
        self._client.on_subscribe = lambda *_: subscribed.set()
        self._client.connect("127.0.0.1", port)
        self._client.subscribe("edge_llm/v1/+/reply/#", qos=1)
        self._client.loop_start()
        assert subscribed.wait(WAIT_S)

    def _count(self, _client, _data, message) -> None:
        event = json.loads(message.payload)
        if event["type"] != "delta":
            self.by_query[message.topic.split("/")[4], event["id"]] += 1

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


@pytest.fixture
def terminal_events(mosquitto):
    events = TerminalEvents(mosquitto.port)
    yield events
    events.close()


def test_fifty_queries_of_ten_users_get_one_terminal_event_each(
    mosquitto, terminal_events, start_daemon, connect, expected
):
    start_daemon(mosquitto.port, "serving.max_queued_per_user=8")
    askers = [connect(mosquitto.port, user=f"user{number}") for number in range(10)]
    texts = {(user, number): f"question {number} of {user}" for user in range(10) for number in range(5)}
    sent = {key: askers[key[0]].send(text, id=f"q{key[1]}", max_tokens=24) for key, text in texts.items()}
    cancelled = {(2, 4), (7, 4), (9, 3), (9, 4)}
    for key in cancelled:
        askers[key[0]].cancel(sent[key])
    ended_by: Counter[str] = Counter()
    for key, query_id in sent.items():
        events = list(askers[key[0]].events(query_id, timeout_s=WAIT_S))
        assert [event["seq"] for event in events] == list(range(len(events)))
        final = events[-1]
        ended_by[final["finish_reason"]] += 1
        if final["finish_reason"] == "cancelled":
            assert key in cancelled
        else:
            assert final["text"] == expected(texts[key], max_tokens=24)
    assert 0 < ended_by["cancelled"] <= len(cancelled)
    # Whatever the daemon sent before this answer has been seen when the answer is.
    askers[0].ask("the last one", id="barrier")
    wait_for(lambda: ("user0", "barrier") in terminal_events.by_query, WAIT_S)
    assert terminal_events.by_query == Counter(
        [("user0", "barrier"), *((f"user{user}", f"q{number}") for user, number in texts)]
    )


def test_a_session_goes_on(mosquitto, start_daemon, connect, expected):
    start_daemon(mosquitto.port)
    asker = connect(mosquitto.port)
    first = asker.ask("one", session="s")["text"]
    second = asker.ask("two", session="s")
    assert second["text"] == expected("one", first, "two")
    assert asker.ask("two")["text"] == expected("two")


def test_info_status_and_metrics(mosquitto, start_daemon, connect):
    start_daemon(mosquitto.port, "serving.metrics_interval_s=0.2")
    connect(mosquitto.port).ask("hello")
    seen: dict[str, dict] = {}
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
    client.on_message = lambda _client, _data, message: seen.update({message.topic: json.loads(message.payload)})
    client.connect("127.0.0.1", mosquitto.port)
    client.subscribe("edge_llm/v1/edge/+")
    client.loop_start()
    try:
        topics = {f"edge_llm/v1/edge/{name}" for name in ("status", "info", "metrics")}
        wait_for(lambda: topics <= seen.keys(), WAIT_S)
    finally:
        client.disconnect()
        client.loop_stop()
    info = seen["edge_llm/v1/edge/info"]
    assert info["bundle"]["digest"] == Bundle.open(TINY_BUNDLE).digest
    assert info["bundle"]["quality"]["max_perplexity_ratio"] == 1.05
    assert info["provider"] == {"used": "CPUExecutionProvider", "refused": {}, "prepared": True}
    assert seen["edge_llm/v1/edge/status"]["state"] == "online"
    assert seen["edge_llm/v1/edge/metrics"]["latency"]["ttft_ms"]["count"] == 1


def test_what_the_scheduler_refuses_arrives_as_an_error(mosquitto, start_daemon, connect):
    start_daemon(mosquitto.port)
    asker = connect(mosquitto.port)
    with pytest.raises(RequestError) as caught:
        asker.ask("word " * 400)
    assert caught.value.code == 413
    with pytest.raises(RequestError) as caught:
        asker.ask("hello", max_tokens=250)
    assert caught.value.code == 413


def test_sigterm_finishes_what_was_accepted_and_refuses_the_rest(mosquitto, start_daemon, connect, slow_bundle):
    daemon = start_daemon(mosquitto.port, bundle=slow_bundle)
    asker = connect(mosquitto.port)
    query_id = asker.send("go on", max_tokens=400)
    events = asker.events(query_id, timeout_s=WAIT_S)
    assert next(events)["type"] == "delta"
    daemon.process.send_signal(signal.SIGTERM)
    wait_for(lambda: any(status.get("state") == "draining" for status in asker._statuses.values()), WAIT_S)
    with pytest.raises(RequestError) as caught:
        asker.ask("too late")
    assert caught.value.code == 503
    final = list(events)[-1]
    assert (final["finish_reason"], final["usage"]["completion_tokens"]) == ("length", 400)
    assert daemon.process.wait(WAIT_S) == 0
    with pytest.raises(DaemonOfflineError, match="offline"):
        connect(mosquitto.port, online=False).wait_online(0.5)


def test_sigterm_out_of_time_ends_with_the_text_so_far(mosquitto, start_daemon, connect, slow_bundle):
    daemon = start_daemon(mosquitto.port, "serving.drain_timeout_s=0.2", bundle=slow_bundle)
    asker = connect(mosquitto.port)
    events = asker.events(asker.send("go on", max_tokens=1900), timeout_s=WAIT_S)
    next(events)
    assert daemon.stop() == 0
    final = list(events)[-1]
    assert final["finish_reason"] == "cancelled"
    assert final["text"]


def test_a_second_signal_cuts_the_drain_short(mosquitto, start_daemon, connect, slow_bundle):
    daemon = start_daemon(mosquitto.port, bundle=slow_bundle)
    asker = connect(mosquitto.port)
    events = asker.events(asker.send("go on", max_tokens=1900), timeout_s=WAIT_S)
    next(events)
    daemon.process.send_signal(signal.SIGINT)
    wait_for(lambda: "stopping" in daemon.log(), WAIT_S)
    daemon.process.send_signal(signal.SIGINT)
    assert list(events)[-1]["finish_reason"] == "cancelled"
    assert daemon.process.wait(WAIT_S) == 0


def test_a_signal_that_another_thread_receives_stops_it_too(mosquitto, start_daemon, connect):
    daemon = start_daemon(mosquitto.port)
    connect(mosquitto.port)
    threads = [int(path.name) for path in Path(f"/proc/{daemon.process.pid}/task").iterdir()]
    other = next(thread for thread in threads if thread != daemon.process.pid)
    tgkill = {"x86_64": 234, "aarch64": 131}[platform.machine()]
    ctypes.CDLL(None).syscall(tgkill, daemon.process.pid, other, signal.SIGTERM)
    assert daemon.process.wait(WAIT_S) == 0


def test_sigterm_while_preparing_stops_at_once_and_leaves_no_half_copy(mosquitto, start_daemon, slow_bundle, tmp_path):
    daemon = start_daemon(mosquitto.port, bundle=slow_bundle)
    wait_for(lambda: list(tmp_path.glob("cache/prepared/.building-*")), WAIT_S)
    assert daemon.stop() == 0
    assert '"online"' not in daemon.log()
    assert "Traceback" not in daemon.log()
    assert not list(tmp_path.glob("cache/prepared/*"))


def test_errors_of_a_busy_daemon(mosquitto, start_daemon, connect, slow_bundle):
    start_daemon(mosquitto.port, "engine.slots=1", "serving.max_queued_per_user=1", bundle=slow_bundle)
    asker = connect(mosquitto.port)
    running = asker.send("go on", max_tokens=1500)
    assert next(asker.events(running, timeout_s=WAIT_S))["type"] == "delta"
    waiting = asker.send("me too", max_tokens=5, deadline_ms=50)
    refused = asker.send("and me", max_tokens=5)
    assert next(asker.events(refused, timeout_s=WAIT_S))["code"] == 429
    assert next(asker.events(waiting, timeout_s=WAIT_S))["code"] == 408


def test_a_broker_killed_during_an_answer_gets_it_when_it_is_back(mosquitto, start_daemon, connect, slow_bundle):
    daemon = start_daemon(mosquitto.port, bundle=slow_bundle)
    asker = connect(mosquitto.port)
    events = asker.events(asker.send("go on", max_tokens=600), timeout_s=WAIT_S)
    assert next(events)["type"] == "delta"
    mosquitto.kill()
    wait_for(lambda: "lost the connection" in daemon.log(), WAIT_S)
    mosquitto.start()
    final = list(events)[-1]
    assert (final["type"], final["usage"]["completion_tokens"]) == ("final", 600)


def test_a_daemon_killed_during_an_answer_gets_the_query_again(mosquitto, start_daemon, connect, slow_bundle):
    daemon = start_daemon(mosquitto.port, bundle=slow_bundle)
    asker = connect(mosquitto.port)
    events = asker.events(asker.send("go on", max_tokens=200), timeout_s=WAIT_S)
    assert next(events)["type"] == "delta"
    daemon.kill()
    wait_offline(asker, WAIT_S)
    daemon.start()
    assert list(events)[-1]["usage"]["completion_tokens"] == 200


def test_barge_in(mosquitto, start_daemon, connect, slow_bundle):
    start_daemon(mosquitto.port, bundle=slow_bundle)
    asker = connect(mosquitto.port)
    first = asker.send("go on", max_tokens=1900)
    events = asker.events(first, timeout_s=WAIT_S)
    next(events)
    second = asker.send("stop, instead", supersedes=first, max_tokens=5)
    assert list(events)[-1]["finish_reason"] == "cancelled"
    assert list(asker.events(second, timeout_s=WAIT_S))[-1]["finish_reason"] == "length"


def test_a_pool_of_three_shares_queries_and_a_cancel_reaches_the_owner(mosquitto, start_daemon, connect, slow_bundle):
    for number in range(3):
        start_daemon(mosquitto.port, 'mqtt.pool="fleet"', bundle=slow_bundle, node=f"node{number}")
    for number in range(3):
        connect(mosquitto.port, node=f"node{number}")
    asker = connect(mosquitto.port, pool="fleet")
    ids = [asker.send(f"question {number}", max_tokens=60) for number in range(9)]
    long_id = asker.send("go on", max_tokens=1900)
    finals = [list(asker.events(query_id, timeout_s=WAIT_S))[-1] for query_id in ids]
    assert {final["type"] for final in finals} == {"final"}
    assert len({final["node"] for final in finals}) >= 2
    asker.cancel(long_id)
    assert list(asker.events(long_id, timeout_s=WAIT_S))[-1]["finish_reason"] == "cancelled"
