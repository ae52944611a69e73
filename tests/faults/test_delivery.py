"""Queries that come twice, in disorder, or again after the daemon was killed."""

from __future__ import annotations

import random
import time

import pytest

from tests.brokers import wait_for
from tests.faults.conftest import SLACK_S, WAIT_S

pytestmark = pytest.mark.broker


def test_a_daemon_killed_in_the_middle_of_answers(mosquitto, start_faulty, listen):
    daemon = start_faulty(mosquitto.port, slow=0.05)
    client = listen(mosquitto.port)
    client.wait_status("online")
    plain = client.ask("go on", max_tokens=30)
    # One whose deadline passes while the daemon is away, one whose deadline does not.
    dead = client.ask("too late", max_tokens=30, user="bob", properties={"MessageExpiryInterval": 1})
    alive = client.ask("in time", max_tokens=30, user="cid", properties={"MessageExpiryInterval": 60})
    asked_at = time.monotonic()
    for query_id in (plain, dead, alive):
        client.running(query_id)
    daemon.kill()
    killed_at = time.monotonic()
    client.wait_status("offline", since=asked_at)
    assert time.monotonic() - killed_at < 2.0 + SLACK_S
    wait_for(lambda: time.monotonic() - asked_at > 2.5, WAIT_S)
    daemon.start()
    client.wait_status("online", since=killed_at)
    for query_id in (plain, alive):
        assert client.terminal(query_id)["usage"]["completion_tokens"] == 30
    client.answer("anything else?")
    assert client.terminals(dead) == []


def test_a_deadline_counts_again_from_the_delivery_after_a_kill(mosquitto, start_faulty, listen):
    daemon = start_faulty(mosquitto.port, slow=0.05)
    client = listen(mosquitto.port)
    client.wait_status("online")
    query_id = client.ask("go on", max_tokens=200, deadline_ms=1500)
    client.running(query_id)
    daemon.kill()
    daemon.start()
    restarted_at = time.monotonic()
    client.wait_status("online", since=restarted_at)
    assert client.terminal(query_id)["finish_reason"] == "deadline"
    assert client.terminal(query_id)["timing"]["total_ms"] < 1500 + 1000 * SLACK_S
    client.answer("anything else?")
    assert len(client.terminals(query_id)) == 1


def test_copies_in_any_order_run_once_and_get_one_terminal_event(mosquitto, start_faulty, listen):
    start_faulty(mosquitto.port, slow=0.02)
    client, other = listen(mosquitto.port), listen(mosquitto.port)
    client.wait_status("online")
    bodies = [
        {"id": f"q{number}", "text": f"question {number}", "max_tokens": 20 + number, "cache": "bypass"}
        for number in range(3)
    ]
    copies = [body for body in bodies for _ in range(5)]
    random.Random(7).shuffle(copies)
    for number, body in enumerate(copies):
        (client, other)[number % 2].send("query/ann", body)
    for body in bodies:
        assert client.terminal(body["id"])["usage"]["completion_tokens"] == body["max_tokens"]
    # Copies after the end get the same event again, word for word.
    counts = {body["id"]: len(client.terminals(body["id"])) for body in bodies}
    for body in bodies:
        client.send("query/ann", body)
    client.wait(lambda: all(len(client.terminals(name)) > count for name, count in counts.items()))
    for body in bodies:
        events = client.terminals(body["id"])
        assert all(event == events[0] for event in events)
    report = client.metrics()
    assert (report["finals_length"], report["queries_repeated"]) == (3, 15)
    # The copies that ran together had one event between them.
    assert set(counts.values()) == {1}


def test_disorder_is_answered_message_by_message(mosquitto, start_faulty, listen):
    start_faulty(mosquitto.port, slow=0.02)
    client = listen(mosquitto.port)
    client.wait_status("online")
    # The cancel, and what supersedes, come before their query.
    client.send("cancel/ann", {"id": "early"})
    assert client.terminal("early")["code"] == 404
    second = client.ask("instead", supersedes="first")
    assert client.terminal(second)["code"] == 404
    assert client.answer("one", id="first")["usage"]["completion_tokens"] == 4
    # A transcript backwards, then its query, then its partials once more.
    for seq in (3, 1, 2):
        client.send("partial/ann", {"utterance": "u", "seq": seq, "text": "how far is it"[: 4 * seq]}, qos=0)
    said = client.answer("how far is it", utterance="u", cache="use")
    for seq in (2, 3):
        client.send("partial/ann", {"utterance": "u", "seq": seq, "text": "how far"}, qos=0)
    assert client.answer("how far is it")["text"] == said["text"]
    # The same id with another body is not the same query.
    other = client.ask("two", id="first")
    client.wait(lambda: [event.get("code") for event in client.terminals(other)] == [None, 409])
