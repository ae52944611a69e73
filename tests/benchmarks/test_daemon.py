from __future__ import annotations

import json
from types import SimpleNamespace

import msgspec
import pytest

from benchmarks import daemon
from benchmarks.daemon import DaemonReport, format_report, make_report, split_overhead
from benchmarks.process import Memory, cpu_seconds, machine_busy_seconds, memory
from benchmarks.serving import Answer, Event, ServingError
from edge_llm.engine.prompt import Message
from edge_llm.local_broker import mosquitto_path
from tests.fakes import renderer
from tests.paths import TINY_BUNDLE

TIMING = {"queue_ms": 0.5, "prefill_ms": 40.0, "ttft_ms": 41.0, "total_ms": 90.0}


def answer(first_s=10.043, timing=TIMING):
    delta = Event(first_s, "reply", {"type": "delta", "text": "a"})
    later = Event(first_s + 1, "reply", {"type": "delta", "text": "b"})
    return Answer(10.0, [delta, later], Event(first_s + 2, "reply", {"type": "final", "timing": timing}))


def report(answers, *, rss_anon_mb=360.0, starts_s=(1.0, 1.4, 1.1), idle_cpu_percent=0.1):
    bundle = SimpleNamespace(manifest=SimpleNamespace(name="m", version="1", model=SimpleNamespace(max_seq_len=1024)))
    return make_report(
        machine=daemon.describe_machine(2, ()),
        bundle=bundle,
        slots=4,
        broker="mosquitto",
        starts_s=starts_s,
        idle_cpu_percent=idle_cpu_percent,
        answers=answers,
        busy=Memory(rss_anon_mb + 10, 210.0),
        resting=Memory(rss_anon_mb, 200.0),
        kv_bytes=302_000_000,
    )


def test_overhead_is_publish_to_first_delta_without_the_prefill():
    overhead, wire, queued, prefill = split_overhead(answer())
    assert overhead == pytest.approx(3.0)  # 43 ms at the client, 40 of them prefill: the queue's 0.5 ms stay in
    assert wire == pytest.approx(2.0)
    assert (queued, prefill) == (0.5, 40.0)


@pytest.mark.parametrize("silent", [Answer(1.0), Answer(1.0, final=answer().final)])
def test_an_answer_without_text_cannot_be_measured(silent):
    with pytest.raises(ServingError, match="without any text"):
        split_overhead(silent)


def test_report_has_the_promised_keys_and_judges_the_limits():
    result = report([answer(), answer(10.044), answer(10.049)])
    fields = json.loads(msgspec.json.encode(result))
    expected = {
        "mqtt_overhead_ms_p50": 4.0,
        "start_to_online_s": 1.1,
        "idle_cpu_percent": 0.1,
        "rss_anon_without_kv_mb": 58.0,
        "kv_mb": 302.0,
    }
    assert {name: fields[name] for name in expected} == pytest.approx(expected)
    assert {limit["name"]: limit["reached"] for limit in fields["limits"]} == {
        "mqtt_overhead_ms_p50": False,
        "start_to_online_s": True,
        "idle_cpu_percent": True,
        "rss_anon_without_kv_mb": True,
    }
    assert msgspec.json.decode(msgspec.json.encode(result), type=DaemonReport) == result
    assert "MISSED   mqtt_overhead_ms_p50" in format_report(result)


@pytest.mark.broker
@pytest.mark.skipif(mosquitto_path() is None, reason="mosquitto is not installed")
def test_the_whole_measurement_on_a_tiny_bundle(capsys, tmp_path):
    arguments = ["--bundle", str(TINY_BUNDLE), "--cache-dir", str(tmp_path), "--json"]
    status = daemon.main([*arguments, "--starts", "1", "--queries", "3", "--idle-s", "0.2"])
    result = msgspec.json.decode(capsys.readouterr().out, type=DaemonReport)
    assert status == (0 if all(limit.reached for limit in result.limits) else 1)
    assert (result.queries, result.broker) == (3, "mosquitto")
    assert result.wire_ms_p50 > 0
    assert result.prefill_ms_p50 > 0
    assert 0.05 < result.start_to_online_s < 30
    assert 0 < result.kv_mb < result.rss_anon_mb


def test_a_filling_query_takes_the_whole_context():
    query = daemon._filling_query("q", renderer(), context=200, answer_tokens=20)
    prompt = renderer().encode([Message("user", query["text"])])
    assert len(prompt) + query["max_tokens"] == 200
    assert query["max_tokens"] >= 20


def test_a_daemon_that_cannot_be_measured_is_exit_status_2(monkeypatch, capsys, tmp_path):
    def fail(*_):
        raise ServingError("the daemon is not online: no bundle")

    monkeypatch.setattr(daemon, "measure", fail)
    monkeypatch.setattr(daemon, "prepared_graph", lambda *_: None)
    monkeypatch.setattr(daemon.Bundle, "open", lambda path: None)
    assert daemon.main(["--bundle", str(tmp_path), "--cache-dir", str(tmp_path)]) == 2
    assert "not online" in capsys.readouterr().err


def test_process_figures_of_this_process():
    import os

    before, machine = cpu_seconds(os.getpid()), machine_busy_seconds()
    sum(range(3_000_000))
    assert cpu_seconds(os.getpid()) > before
    assert machine_busy_seconds() > machine
    assert memory(os.getpid()).rss_anon_mb > 5
