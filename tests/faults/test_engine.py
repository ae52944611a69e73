"""Runs that fail, and a wall clock that jumps."""

from __future__ import annotations

import time

import pytest

from tests.brokers import wait_for
from tests.faults.conftest import SLACK_S, WAIT_S

pytestmark = pytest.mark.broker
DAY_S = 86_400


@pytest.mark.parametrize("name", ["MemoryError", "RuntimeException", "OSError"])
def test_a_run_that_fails_costs_its_own_query_and_no_other(mosquitto, start_faulty, listen, name):
    daemon = start_faulty(mosquitto.port, "engine.slots=2", slow=0.02)
    client = listen(mosquitto.port)
    client.wait_status("online")
    expected = client.answer("what is left", max_tokens=30)["text"]
    # In the middle of an answer, and while another one waits for its slot.
    hit = [client.ask("go on", user=user, max_tokens=150) for user in ("ann", "bob")]
    for query_id in hit:
        client.running(query_id)
    waiting = client.ask("what is left", user="cid", max_tokens=30)
    daemon.set("raise", name)
    for query_id in hit:
        event = client.terminal(query_id)
        assert (event["code"], event["retriable"]) == (500, True)
    assert client.terminal(waiting)["text"] == expected
    assert client.answer("what is left", max_tokens=30)["text"] == expected
    # While a prompt is prefilled; nobody else is there.
    daemon.set("raise", name)
    assert client.terminal(client.ask("hello"))["code"] == 500
    again = client.ask("hello", id="again")
    assert client.terminal(again)["type"] == "final"
    assert client.metrics()["errors_500"] == 3
    assert daemon.log().count("Traceback") == 3


@pytest.mark.parametrize("jump_s", [DAY_S, -DAY_S])
def test_a_clock_that_jumps_a_day_changes_no_deadline_and_no_cache(mosquitto, start_faulty, listen, jump_s):
    daemon = start_faulty(mosquitto.port, slow=0.05)
    client = listen(mosquitto.port)
    client.wait_status("online")
    kept = client.answer("what is kept", cache="use")
    assert kept["source"] == "model"
    asked_at = time.monotonic()
    limited = client.ask("go on", user="bob", max_tokens=200, deadline_ms=2500)
    endless = client.ask("go on", user="cid", max_tokens=80, deadline_ms=120_000)
    client.running(limited)
    for clock in (jump_s, 0, jump_s):
        daemon.set("clock", clock)
        # A copy of a query that is known, by another id; and the same one, which runs once.
        again = client.answer("what is kept", cache="use")
        assert (again["source"], again["text"]) == ("response_cache", kept["text"])
    assert client.terminals(limited) == [], "the deadline passed early"
    final = client.terminal(limited)
    assert final["finish_reason"] == "deadline"
    assert 2500 <= final["timing"]["total_ms"] < 2500 + 1000 * SLACK_S
    assert time.monotonic() - asked_at < 2.5 + 2 * SLACK_S
    assert client.terminal(endless)["finish_reason"] == "length"
    client.answer("new here", cache="use")
    # It is written and found again, also by a daemon that starts at another time.
    wait_for(lambda: client.metrics()["gauges"]["responses_kept"] == 2, WAIT_S)
    daemon.kill()
    daemon.set("clock", -jump_s)
    daemon.start()
    client.wait_status("online", since=time.monotonic())
    for text in ("what is kept", "new here"):
        assert client.answer(text, cache="use")["source"] == "response_cache"
    assert daemon.warnings() == []
