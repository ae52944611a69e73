from __future__ import annotations

import json
import os
import random
import tempfile
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from benchmarks.machine import describe_machine
from benchmarks.serving import ServingError
from benchmarks.soak import __main__ as soak
from benchmarks.soak import load
from benchmarks.soak.acts import BASE, SHARES, ActMaker
from benchmarks.soak.load import Notes, User, drain, run
from benchmarks.soak.records import (
    Again,
    Counts,
    Done,
    End,
    Lost,
    RecordError,
    Restart,
    Sample,
    Start,
    read_records,
    to_line,
)
from benchmarks.soak.report import MIN_QUERIES, SETTLE_S, SoakReport, format_report, make_report, rss_slope
from benchmarks.soak.watch import counts_writes, take_sample
from edge_llm.local_broker import mosquitto_path
from edge_llm.mqtt.messages import Incoming, Query, decode_fields
from tests.paths import TINY_BUNDLE

BEGAN = 1000.0
MINUTES = 10.0
END = BEGAN + 60 * MINUTES
MACHINE = describe_machine(2, ())


def start(**fields):
    values = {
        "at": BEGAN,
        "minutes": MINUTES,
        "warm_up_minutes": 2.0,
        "queries_per_second": 4.0,
        "users": 8,
        "restart_minutes": 5.0,
        "bundle": "m 1",
        "broker": "mosquitto",
        "counts_writes": True,
        "machine": MACHINE,
    }
    return Start(**{**values, **fields})


def sample(at, rss_anon_mb=100.0, written_bytes=0, **fields):
    values = {"rss_file_mb": 50.0, "descriptors": 12, "threads": 8, "others_cpu": 0.1, **fields}
    return Sample(at=at, rss_anon_mb=rss_anon_mb, written_bytes=written_bytes, **values)


def query(sent_at, answer_ms=10.0, *, number=0, kind="new", outcome="final_stop"):
    return Done(
        id=f"q{number}", kind=kind, sent_at=sent_at, first_ms=answer_ms / 2, answer_ms=answer_ms, outcome=outcome
    )


def again(at, *, same=True, asked_for=False, refused=False):
    return Again(id="q", kind="new", at=at, same=same, asked_for=asked_for, refused=refused)


def samples(slope_mb_per_h=0.0, bytes_a_second=0):
    return [
        sample(BEGAN + second, 100 + slope_mb_per_h * second / 3600, bytes_a_second * second)
        for second in range(0, int(60 * MINUTES) + 1, 5)
    ]


def report(*records, started=None, ended=True):
    end = [End(at=END, counters={"finals_stop": 1}, log_bytes=2_000)] if ended else []
    return make_report([started or start(), *(records or samples()), *end])


def verdicts(result):
    return {bound.name: bound.reached for bound in result.bounds}


# -- memory -----------------------------------------------------------------------------------------------------------


def test_slope_of_a_straight_line():
    slope = rss_slope([0, 1800, 3600], [100.0, 101.0, 102.0])
    assert (slope.per_hour, slope.standard_error, slope.samples) == (2.0, 0.0, 3)


def test_slope_and_its_error_are_those_of_least_squares_when_neighbours_are_independent():
    rng = np.random.default_rng(1)
    hours = np.arange(600) / 600
    values = 100 + 0.4 * hours + rng.normal(0, 0.5, 600)
    (expected, _), covariance = np.polyfit(hours, values, 1, cov=True)
    slope = rss_slope(hours * 3600, values)
    assert slope.per_hour == pytest.approx(expected, abs=1e-3)
    # The lag-1 correlation of noise is not exactly zero.
    assert slope.standard_error == pytest.approx(covariance[0, 0] ** 0.5, rel=0.1)


def test_samples_that_resemble_their_neighbours_count_for_less():
    rng = np.random.default_rng(2)
    steps = np.repeat(rng.normal(0, 0.5, 30), 20)
    mixed = rng.permutation(steps)
    at_s = np.arange(600) * 6.0
    assert rss_slope(at_s, steps).standard_error > 3 * rss_slope(at_s, mixed).standard_error


@pytest.mark.parametrize(("at_s", "mb"), [([], []), ([0, 5], [1.0, 2.0]), ([3, 3, 3], [1.0, 2.0, 3.0])])
def test_too_little_for_a_slope(at_s, mb):
    assert rss_slope(at_s, mb) is None


def test_memory_counts_after_the_warm_up_only():
    filling = [sample(BEGAN + second, 50 + second / 2) for second in range(0, 120, 5)]
    level = [sample(BEGAN + second, 110.0) for second in range(120, 601, 5)]
    result = report(*filling, *level)
    assert (result.rss_slope.per_hour, result.rss_slope.samples) == (0.0, len(level))
    assert (result.rss_anon_mb.first, result.rss_anon_mb.last) == (110.0, 110.0)


@pytest.mark.parametrize(("rise", "reached"), [(0.5, True), (0.6, False)])
def test_memory_may_rise_half_a_megabyte_an_hour(rise, reached):
    assert verdicts(report(*samples(rise)))["rss_slope_mb_per_h"] is reached


def test_first_last_and_most_of_descriptors_and_threads():
    counts = [(12, 8), (19, 9), (13, 8)]
    rows = [
        sample(BEGAN + 200 + number, descriptors=files, threads=threads, gauges={"sessions": float(number)})
        for number, (files, threads) in enumerate(counts)
    ]
    result = report(*rows)
    assert msgspec.to_builtins(result.descriptors) == {"first": 12, "last": 13, "most": 19}
    assert msgspec.to_builtins(result.threads) == {"first": 8, "last": 8, "most": 9}
    assert result.gauges == {"sessions": [0.0, 2.0]}


# -- latency ----------------------------------------------------------------------------------------------------------


def test_latency_of_the_last_tenth_against_the_first():
    first = [query(BEGAN + 10, 10.0 + number) for number in range(101)]
    last = [query(END - 10, 2 * (10.0 + number)) for number in range(101)]
    result = report(*samples(), *first, *last)
    assert [latency is None for latency in result.tenths] == [False] + [True] * 8 + [False]
    assert (result.tenths[0].answer_p50, result.tenths[0].first_text_p50) == (60.0, 30.0)
    assert result.tenths[0].answer_p99 == 109.0
    assert result.tenths[0].others_cpu == 0.1
    assert result.p99_last_over_first == 2.0
    assert verdicts(result)["p99_last_over_first"] is False
    assert report(*samples(), *first[: MIN_QUERIES - 1], *last).p99_last_over_first is None


def test_only_plain_queries_that_met_no_restart_count_for_latency():
    down = Restart(killed_at=BEGAN + 30, back_at=BEGAN + 35)
    counted = [query(BEGAN + 10), query(BEGAN + 35.1 + SETTLE_S, 20.0)]
    others = [
        query(BEGAN + 29, 6000.0),  # asked before, answered after
        query(BEGAN + 31, 9000.0),
        query(BEGAN + 34.9 + SETTLE_S, 500.0),
        query(BEGAN + 11, 700.0, kind="background"),
        query(BEGAN + 11, 700.0, outcome="error_429"),
        query(BEGAN + 11, 700.0, outcome="final_deadline"),
    ]
    result = report(*samples(), down, *counted, *others)
    assert (result.tenths[0].queries, result.tenths[0].answer_p50) == (2, 15.0)
    assert result.restarts_s == [5.0]


# -- terminal events, disk, verdict -----------------------------------------------------------------------------------


def test_what_counts_as_doubled():
    down = Restart(killed_at=BEGAN + 30, back_at=BEGAN + 35)
    allowed = [again(BEGAN + 200, asked_for=True), again(BEGAN + 36), again(BEGAN + 30)]
    result = report(*samples(), down, *allowed)
    assert (result.doubled, result.repeated_on_request, result.repeated_at_restart) == (0, 1, 2)
    retried = again(BEGAN + 201, same=False, asked_for=True, refused=True)
    assert report(*samples(), down, retried).repeated_on_request == 1
    forbidden = [
        again(BEGAN + 200),
        again(BEGAN + 36, same=False),
        again(BEGAN + 202, same=False, asked_for=True),
        again(BEGAN + 203, same=False, refused=True),
    ]
    result = report(*samples(), down, *allowed, *forbidden)
    assert (result.doubled, result.repeated_on_request, result.repeated_at_restart) == (4, 1, 2)
    assert verdicts(result)["doubled"] is False
    assert len(result.examples) == 4


def test_a_lost_query_is_a_miss_and_stands_in_the_report():
    result = report(*samples(), Lost(id="q7", kind="spoken", sent_at=BEGAN))
    assert verdicts(result)["lost"] is False
    assert "q7" in format_report(result)


def test_what_a_day_of_a_thousand_queries_writes():
    finals = [query(BEGAN + 10 + number, number=number) for number in range(50)]
    refused = [query(BEGAN + 10, outcome="error_400", kind="bad_400")]
    result = report(*samples(bytes_a_second=5_000), *finals, *refused)
    assert result.written_mb == 3.0  # 600 s
    assert result.written_mb_a_day == 60.0
    assert verdicts(result)["written_mb_a_day"] is False
    assert (result.finals, result.logged_mb) == (50, 0.002)


def test_what_linux_does_not_count_is_unknown_and_no_pass(monkeypatch, capsys):
    result = report(*samples(bytes_a_second=5_000), query(BEGAN + 1), started=start(counts_writes=False))
    assert (result.written_mb_a_day, verdicts(result)["written_mb_a_day"]) == (None, None)
    assert "unknown  written_mb_a_day -" in format_report(result)


def test_the_report_is_whole_in_json_and_in_lines():
    counts = [Counts(process=0, counts={"sent_new": 1}), Counts(process=1, counts={"sent_new": 4})]
    counts += [Counts(process=0, counts={"sent_new": 3, "deltas": 9})]
    near_both_ends = [query(at) for at in (BEGAN + 10, END - 10) for _ in range(MIN_QUERIES)]
    result = report(*samples(0.3, 10), *counts, *near_both_ends)
    assert result.counts == {"deltas": 9, "sent_new": 7}
    assert result.outcomes == {"new": {"final_stop": 2 * MIN_QUERIES}}
    assert all(verdicts(result).values())
    assert msgspec.json.decode(msgspec.json.encode(result), type=SoakReport) == result
    shown = format_report(result)
    assert "anonymous memory rises 0.30 MB/h (standard error 0.00, 97 samples)" in shown
    assert "reached  rss_slope_mb_per_h 0.3, at most 0.5" in shown


def test_a_run_that_was_killed_can_be_reported(tmp_path, capsys):
    path = tmp_path / "records.jsonl"
    lines = [to_line(record) for record in (start(), *samples()[:60], query(BEGAN + 10))]
    path.write_bytes(b"".join(lines) + lines[-1][:20])
    assert soak.main(["--from", str(path), "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert (result["complete"], result["minutes"], result["finals"]) == (False, 4.92, 1)
    assert {bound["name"]: bound["reached"] for bound in result["bounds"]}["lost"] is None


def test_a_file_of_something_else_is_named(tmp_path, capsys):
    path = tmp_path / "records.jsonl"
    path.write_bytes(to_line(start()) + b'{"type": "sample", "at": "noon"}\n')
    with pytest.raises(RecordError, match=r"records\.jsonl:2: .*\$\.at"):
        list(read_records(path))
    path.write_bytes(b"")
    assert soak.main(["--from", str(path)]) == 2
    assert "before anything was measured" in capsys.readouterr().err


# -- the load ---------------------------------------------------------------------------------------------------------


def maker():
    return ActMaker("ann", "car", random.Random(3))


def test_every_act_can_be_drawn_and_no_id_comes_twice():
    assert sum(SHARES.values()) == 100
    acts = maker()
    messages = [message for kind in SHARES for _ in range(40) for message in acts.make(kind)]
    kinds = {message.kind for message in messages}
    assert kinds >= {"partial", "cancel", "superseding", "unknown_topic", "odd_user", "reused_id", "bad_413", "bad_415"}
    ids = [message.query_id for message in messages if message.query_id and message.kind != "twice"]
    assert len(set(ids)) == len(ids)
    assert any(message.passing for message in messages if message.kind == "vanished")


def test_what_should_be_answered_is_what_the_daemon_takes():
    acts = maker()
    for kind in set(SHARES) - {"bad", "abandoned"}:
        for message in acts.make(kind):
            if message.query_id is not None:
                incoming = Incoming(message.topic, message.payload, received_at=0.0)
                fields = decode_fields(incoming, max_payload_bytes=16_384, bare_field="text")
                assert Query.parse(fields).id == message.query_id


class Wire:
    """Stands for the client of a user: what it has published, and what comes."""

    def __init__(self, user):
        self.user = user
        self.published = []
        user._client = SimpleNamespace(publish=lambda topic, payload, *_, **__: self.published.append(payload))

    def receive(self, event, place="reply/ann/default", at=BEGAN):
        message = SimpleNamespace(topic=f"{BASE}/{place}", payload=json.dumps(event).encode(), timestamp=at)
        self.user._on_message(message)


@pytest.fixture
def notes(monkeypatch):
    kept = Notes(0)
    kept.written = []
    monkeypatch.setattr(kept, "write", kept.written.append)
    return kept


@pytest.fixture
def wire(notes):
    return Wire(User("ann", maker(), notes, 1))


def terminal(message, text="yes"):
    return {"type": "final", "id": message.query_id, "finish_reason": "stop", "text": text}


def test_a_second_terminal_event_is_noted_with_what_explains_it(wire, notes):
    (message,) = maker().make("new")
    wire.user.send(message)
    wire.receive({"type": "delta", "id": message.query_id, "text": "y"}, at=load.time.monotonic() + 1)
    wire.receive(terminal(message), at=load.time.monotonic() + 2)
    (done,) = notes.written
    assert (done.outcome, done.kind, done.sends) == ("final_stop", "new", 1)
    assert done.first_ms == pytest.approx(1000, rel=0.1)
    assert done.answer_ms == pytest.approx(2000, rel=0.1)
    wire.receive(terminal(message))
    wire.receive(terminal(message, "no"))
    wire.user.send(message)
    wire.user.send(message)
    wire.user.send(message)
    wire.receive(terminal(message))
    assert [(note.same, note.asked_for) for note in notes.written[1:]] == [(True, False), (False, False), (True, True)]
    assert wire.user.unanswered() == []


def test_a_refusal_that_may_be_retried_explains_another_answer(wire, notes):
    (message,) = maker().make("new")
    wire.user.send(message)
    wire.user.send(message)
    wire.receive({"type": "error", "id": message.query_id, "code": 429, "retriable": True})
    wire.receive(terminal(message))
    assert [getattr(note, "outcome", None) for note in notes.written] == ["error_429", None]
    assert (notes.written[1].same, notes.written[1].asked_for, notes.written[1].refused) == (False, True, True)


def test_at_the_end_what_stays_unanswered_is_lost(wire, notes, monkeypatch):
    now = 0.0

    def sleep(seconds):
        nonlocal now
        now += seconds
        if answered and now > load.DRAIN_PAUSE_S - 1:
            wire.receive(terminal(answered.pop()))

    monkeypatch.setattr(load, "time", SimpleNamespace(monotonic=lambda: now, sleep=sleep))
    acts = maker()
    (lost,), (late,) = acts.make("repeated"), acts.make("new")
    answered = [late]
    wire.user.send(lost)
    wire.user.send(late)
    drain([wire.user], notes)
    # It was waited for as long again, once an answer had come.
    assert now > 2 * load.DRAIN_PAUSE_S - 2
    assert [note.id for note in notes.written if isinstance(note, Lost)] == [lost.query_id]


def test_what_is_unanswered_is_asked_again_when_the_daemon_is_back_unless_it_was_lost_long_ago(
    wire, notes, monkeypatch
):
    acts = maker()
    (old,), (recent,) = acts.make("new"), acts.make("new")
    now = load.time.monotonic()
    clock = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr(load, "time", clock)
    wire.user.send(old)
    now += load.OVERDUE_S
    wire.user.send(recent)
    wire.published.clear()
    now += 1
    wire.receive({"state": "offline"}, "status")
    assert wire.published == []
    wire.receive({"state": "online"}, "status")
    assert wire.published == [recent.payload]
    assert {lost.id for lost in wire.user.unanswered()} == {old.query_id, recent.query_id}
    # Published twice, it may be answered twice.
    for _ in range(2):
        wire.receive(terminal(recent))
    assert notes.written[0].sends == 2
    assert notes.written[1].asked_for


def test_replies_about_cancels_and_ratings_are_no_terminal_events(wire, notes):
    (message,) = maker().make("new")
    wire.user.send(message)
    wire.receive({"type": "error", "id": message.query_id, "code": 404}, "reply/ann/other")
    assert notes.written == []
    assert len(wire.user.unanswered()) == 1


def test_acts_come_at_the_rate_that_was_asked_for(notes, monkeypatch):
    now, sent = 0.0, []

    def wait(seconds):
        nonlocal now
        now += max(seconds, 1e-4)
        stop.set_after()

    stop = SimpleNamespace(is_set=lambda: now >= 100, wait=wait, set_after=lambda: None)
    monkeypatch.setattr(load, "time", SimpleNamespace(monotonic=lambda: now))
    user = SimpleNamespace(acts=maker(), send=sent.append)
    run([user], 4.0, notes, stop, random.Random(4))
    begun = [message for message in sent if message.after_s == 0]
    assert 300 < len(begun) < 500
    assert isinstance(notes.written[0], Counts)


# -- the whole --------------------------------------------------------------------------------------------------------


def test_a_sample_of_this_process():
    taken = take_sample(os.getpid(), 1.3, {"gauges": {"queued": 2}})
    assert taken.rss_anon_mb > 5
    assert taken.descriptors > 2
    assert taken.threads >= 1
    assert (taken.others_cpu, taken.gauges) == (1.0, {"queued": 2})


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no folder is known to be in memory here")
def test_what_stays_in_memory_is_not_counted_as_written():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        assert not counts_writes(Path(name))
        assert os.listdir(name) == []


@pytest.mark.broker
@pytest.mark.timeout(300)
@pytest.mark.skipif(mosquitto_path() is None, reason="mosquitto is not installed")
def test_seconds_of_soak_on_a_tiny_bundle(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(soak, "_METRICS_TIMEOUT_S", 0.1)
    monkeypatch.setattr(soak, "_PROGRESS_S", 5.0)
    out = tmp_path / "records.jsonl"
    arguments = ["--bundle", str(TINY_BUNDLE), "--cache-dir", str(tmp_path / "cache"), "--json", "--out", str(out)]
    arguments += ["--minutes", "0.2", "--restart-minutes", "0.1", "--sample-s", "0.5", "--warm-up-minutes", "0.1"]
    status = soak.main([*arguments, "--queries-per-second", "6", "--users", "4"])
    captured = capsys.readouterr()
    result = msgspec.json.decode(captured.out, type=SoakReport)
    assert status in (0, 1)
    assert (result.lost, result.doubled) == (0, 0), result.examples
    assert result.complete
    assert result.finals > 10
    assert len(result.restarts_s) >= 1
    assert result.rss_anon_mb.last > 5
    assert result.counts["sent_partial"] > 0
    assert not any("error_500" in row for row in result.outcomes.values())
    assert "queries ended" in captured.err
    assert make_report(read_records(out)) == result
    assert list((tmp_path / "cache").glob(".soak-*")) == []


def test_a_daemon_that_does_not_come_up_is_exit_status_2(monkeypatch, capsys):
    def fail(_options):
        raise ServingError("the daemon does not answer: no bundle")

    monkeypatch.setattr(soak, "measure", fail)
    assert soak.main([]) == 2
    assert "no bundle" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["0", "-1", "nan", "inf", "many"])
def test_minutes_must_be_a_number_above_0(wrong, capsys):
    with pytest.raises(SystemExit):
        soak.main([f"--minutes={wrong}"])
    assert "is not a number above 0" in capsys.readouterr().err
