from __future__ import annotations

import json
import sys
import time
from types import SimpleNamespace
from xml.etree import ElementTree

import msgspec
import numpy as np
import pytest

from benchmarks.machine import describe_machine
from benchmarks.serving import Answer, Event, ServingError
from benchmarks.voice import __main__ as voice
from benchmarks.voice import modes, peer
from benchmarks.voice.client import UNHEARD_S, Sample, replay, to_sample
from benchmarks.voice.modes import OWN_MODES, Amounts, Extras, ModeRun, counted, settings_of
from benchmarks.voice.peer import PEER_MODES, PeerError, to_request
from benchmarks.voice.plot import distribution_svg
from benchmarks.voice.prompts import Prompts
from benchmarks.voice.report import Report, format_progress, format_report, judge, make_report, make_row
from benchmarks.voice.restore import restore_ms
from benchmarks.voice.trace import make_trace
from benchmarks.voice.words import SYSTEM_PROMPT
from edge_llm.bundle.manifest import Bundle
from edge_llm.config import Config
from edge_llm.local_broker import mosquitto_path
from tests.paths import TINY_BUNDLE

TIMING = {"queue_ms": 0.1, "prefill_ms": 20.0, "ttft_ms": 21.0, "total_ms": 91.0}
USAGE = {"prompt_tokens": 220, "cached_tokens": 200, "cached_from": "tree", "completion_tokens": 11}
FINAL = {"type": "final", "source": "model", "usage": USAGE, "timing": TIMING}
TOP_KEYS = {
    "machine",
    "rows",
    "restore_200_tokens_ms",
    "hit_p50_ms",
    "hit_p99_ms",
    "preemption_p99_ms",
    "rss_growth",
    "goals",
}


def sample(first_ms, *, asked_before=False, source="model", cached_from="tree", decode_ms=7.0):
    return Sample(first_ms, asked_before, source, cached_from, 200, 220, 11, decode_ms)


def run(mode, *first_ms, **fields):
    return ModeRun(mode, samples=[sample(value) for value in first_ms], others_cpu=0.01, **fields)


def machine():
    described = describe_machine(2, ())
    described["run"] = {
        "bundle": "m 1",
        "context": 1024,
        "broker": "mosquitto",
        "queries": 3,
        "speed": 1.0,
        "max_tokens": 24,
        "system_tokens": 204,
        "pair_prefetched_tokens": 60,
        "rss_quarters_mb": [100.0, 101.0],
    }
    return described


def every_run():
    speculative = run("speculative", 20.0, 24.0, computed_tokens=30, wasted_tokens=9, max_cache_bytes=1000)
    speculative.samples += [
        sample(2.0, asked_before=True, source="response_cache", cached_from=None, decode_ms=None),
        sample(4.0, source="prefetch", cached_from=None, decode_ms=None),
    ]
    return [
        run("cold", 200.0, 210.0, 220.0),
        run("prefix", 40.0, 50.0, 60.0, max_cache_bytes=500),
        run("partials", 16.0, 18.0, 25.0),
        speculative,
        run("llama.cpp", 60.0, 70.0, 80.0),
        run("llama.cpp+partials", 30.0, 36.0, 40.0),
    ]


def extras():
    return Extras(
        hits_ms=[1.0, 2.0, 3.0], alone_ms=[20.0, 21.0], disturbed_ms=[30.0, 31.0], rss_mb=[100.0] * 4 + [101.0] * 4
    )


def report():
    return make_report(machine(), every_run(), extras(), 1.234)


def goals(result):
    return {goal.name: goal for goal in result.goals}


# -- the client -------------------------------------------------------------------------------------------------------


def test_a_sample_is_the_time_from_publish_to_the_first_delta():
    answer = Answer(10.0, [Event(10.025, "reply", {}), Event(10.09, "reply", {})], Event(10.1, "reply", FINAL))
    taken = to_sample(answer, asked_before=True)
    assert taken.first_ms == pytest.approx(25.0)
    assert taken.decode_ms == pytest.approx(7.0)
    assert (taken.asked_before, taken.source, taken.cached_from, taken.cached_tokens) == (True, "model", "tree", 200)


def test_a_final_without_deltas_counts_as_the_first_text_and_tells_nothing_of_steps():
    final = {**FINAL, "source": "response_cache", "timing": {**TIMING, "ttft_ms": None}}
    taken = to_sample(Answer(10.0, [], Event(10.002, "reply", final)), asked_before=True)
    assert taken.first_ms == pytest.approx(2.0)
    assert taken.decode_ms is None


def test_an_utterance_is_published_word_by_word_and_the_query_takes_the_last_partials_place():
    said = []

    class Client:
        def publish_partial(self, user, utterance, seq, text):
            said.append((user, utterance, seq, text))

        def ask_as(self, daemon, user, query):
            said.append((user, query))
            return Answer(time.monotonic(), [], Event(time.monotonic(), "reply", FINAL))

    utterance = make_trace(1)[0]
    replay(Client(), None, utterance, speed=1e6, listened=True)
    *partials, query = said
    assert [text for *_, text in partials] == [partial.text for partial in utterance.partials]
    assert [seq for _, _, seq, _ in partials] == list(range(len(utterance.partials)))
    assert query == (utterance.user, {"id": utterance.id, "utterance": utterance.id, "text": utterance.text})
    said.clear()
    replay(Client(), None, utterance, speed=1e6, listened=False)
    assert said == [query]


# -- the modes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", OWN_MODES)
def test_modes_are_settings_of_the_daemon(mode):
    layer = {}
    for key, value in settings_of(mode).items():
        table, name = key.split(".")
        layer.setdefault(table, {})[name] = value
    config = msgspec.convert(layer, Config)
    assert config.serving.system_prompt == SYSTEM_PROMPT
    assert (config.cache.prefix, config.cache.snapshots) == (mode != "cold",) * 2
    assert config.prefetch.partials == (mode in ("partials", "speculative"))
    everything = {config.cache.responses, config.prefetch.speculation, config.prefetch.popularity}
    assert everything == {mode == "speculative"}


def test_counters_are_differences_and_a_missing_one_is_none():
    before, after = {"counters": {"a": 3}}, {"counters": {"a": 10, "b": 4}}
    assert (counted("a", before, after), counted("b", before, after), counted("c", before, after)) == (7, 4, None)
    assert counted("a", {}, {}) is None


def test_a_daemon_that_fails_is_a_row_that_says_so(monkeypatch, tmp_path):
    def fail(*_):
        raise ServingError("the daemon is not online: no bundle")

    monkeypatch.setattr(modes, "serving", fail)
    failed, more = modes.run_mode("cold", None, tmp_path, None, make_trace(3), Amounts(1.0, 0, 0, 0))
    assert failed.status == "failed: the daemon is not online: no bundle"
    assert make_row(failed).p50_ms is None
    assert more == Extras()


def test_growth_is_the_last_quarter_over_the_first():
    assert Extras(rss_mb=[100.0, 100.0, 150.0, 150.0, 150.0, 150.0, 103.0, 103.0]).rss_growth == pytest.approx(0.03)
    assert Extras(rss_mb=[1.0, 1.0, 1.0]).rss_growth is None


def test_preemption_is_the_difference_of_the_percentiles():
    assert extras().preemption_p99_ms == pytest.approx(10.0)
    assert Extras().preemption_p99_ms is None


# -- the peer ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prompts():
    return Prompts(Bundle.open(TINY_BUNDLE), "You are a car.")


def test_a_partials_tokens_are_the_beginning_of_its_querys(prompts):
    text = "How far is it"
    whole, part = prompts.query(text), prompts.partial(text)
    assert part == whole[: len(part)]
    assert len(whole) > len(part) > prompts.shared_tokens
    longer = prompts.partial(text + " to Bremen")
    assert longer[: len(part)] == part


def test_the_peer_hears_partials_only_when_asked_to(prompts):
    utterance = make_trace(1)[0]
    deaf = to_request(utterance, prompts, 2.0, with_partials=False)
    hearing = to_request(utterance, prompts, 2.0, with_partials=True)
    assert deaf["partials"] == []
    assert [at_s for at_s, _ in hearing["partials"]] == [partial.at_s / 2 for partial in utterance.partials]
    assert (deaf["at_s"], hearing["at_s"]) == (UNHEARD_S / 2, utterance.duration_s / 2)
    assert hearing["prompt_ids"] == prompts.query(utterance.text)


def lineup_of(missing, prepare):
    return lambda model: [SimpleNamespace(engine="llama.cpp", missing=missing, prepare=prepare)]


def test_a_peer_that_is_not_installed_or_breaks_is_a_row_that_says_so(monkeypatch, prompts, tmp_path):
    def no_disk(cache_dir):
        raise RuntimeError("no disk")

    arguments = ("llama.cpp", Bundle.open(TINY_BUNDLE), tmp_path, prompts, 2, make_trace(2), 1e6)
    monkeypatch.setattr(peer, "lineup", lineup_of("missing: pip install llama-cpp-python", None))
    assert peer.run_peer(*arguments).status == "missing: pip install llama-cpp-python"
    monkeypatch.setattr(peer, "lineup", lineup_of(None, no_disk))
    assert peer.run_peer(*arguments).status == "failed: no disk"


def test_a_peer_process_that_ends_says_its_last_words(tmp_path):
    with pytest.raises(PeerError, match="failed: "):
        peer.PeerProcess(tmp_path / "no.gguf", 2, 64)


class FakePeer:
    def __init__(self, path, threads, context):
        self.heard = []

    def hear(self, utterance):
        self.heard.append(utterance)
        return {"first_ms": 5.0, "reused_tokens": 9, "completion_tokens": 3, "decode_ms": 1.0}

    def close(self):
        pass


def test_the_peers_samples(monkeypatch, prompts, tmp_path):
    monkeypatch.setattr(peer, "lineup", lineup_of(None, lambda cache_dir: cache_dir / "model.gguf"))
    monkeypatch.setattr(peer, "PeerProcess", FakePeer)
    trace = make_trace(3)
    result = peer.run_peer("llama.cpp+partials", Bundle.open(TINY_BUNDLE), tmp_path, prompts, 2, trace, 1.0)
    assert result.status == "ok"
    assert [taken.prompt_tokens for taken in result.samples] == [len(prompts.query(each.text)) for each in trace]
    row = make_row(result)
    assert (row.p50_ms, row.cached_tokens_per_query, row.sources) == (5.0, 9.0, {})


# -- restoring --------------------------------------------------------------------------------------------------------


def test_rows_are_restored_into_every_other_slot():
    rows = np.zeros((3, 1, 2, 1, 4), np.float32)
    written = []
    cache = SimpleNamespace(
        slots=3, read_rows=lambda slot, start, stop: rows, write_rows=lambda slot, start, data: written.append(slot)
    )
    assert len(restore_ms(cache, 1, 3, 6)) == 6
    assert written == [0, 2, *[0, 2] * 3]


# -- the report -------------------------------------------------------------------------------------------------------


def test_json_has_the_promised_keys_and_comes_back():
    result = report()
    encoded = msgspec.json.encode(result)
    fields = json.loads(encoded)
    assert set(fields) == TOP_KEYS
    assert [row["mode"] for row in fields["rows"]] == [*OWN_MODES, *PEER_MODES]
    assert all({"p50_ms", "p95_ms", "p99_ms", "new_p50_ms", "new_p99_ms"} <= set(row) for row in fields["rows"])
    for goal in fields["goals"]:
        assert set(goal) in ({"name", "at_most", "value", "reached"}, {"name", "at_least", "value", "reached"})
    assert msgspec.json.decode(encoded, type=Report) == result


def test_rows_tell_new_queries_from_repeated_ones():
    rows = {row.mode: row for row in report().rows}
    speculative = rows["speculative"]
    assert (speculative.queries, speculative.new_queries) == (4, 3)
    assert (speculative.p50_ms, speculative.new_p50_ms, speculative.repeated_p50_ms) == (12.0, 20.0, 2.0)
    assert speculative.sources == {"model": 0.5, "response_cache": 0.25, "prefetch": 0.25}
    assert speculative.cached_from == {"tree": 0.5, "none": 0.5}
    assert (speculative.computed_tokens_per_query, speculative.wasted_tokens_per_query) == (7.5, 2.2)
    assert (speculative.speculative_hits_new.count, speculative.speculative_hits_new.p50_ms) == (1, 4.0)
    assert rows["cold"].speculative_hits_new is None
    assert rows["cold"].wasted_tokens_per_query is None
    assert rows["cold"].decode_step_ms == 7.0


def test_gains_are_stated_against_prefix():
    rows = {row.mode: row for row in report().rows}
    assert rows["partials"].gain_p50 == pytest.approx(50 / 18, abs=0.01)
    assert rows["speculative"].new_gain_p50 == pytest.approx(50 / 20, abs=0.01)
    assert rows["cold"].gain_p50 is None


def test_goals_of_a_good_run_are_reached():
    result = report()
    assert {name: goal.reached for name, goal in goals(result).items()} == {
        "restore_200_tokens_ms": True,
        "cold_p50_over_prefix_p50": True,
        "partials_new_p50_ms": True,
        "hit_p50_ms": True,
        "hit_p99_ms": True,
        "preemption_p99_ms": True,
        "llama.cpp+partials_p50_over_partials_p50": True,
        "llama.cpp+partials_p95_over_partials_p95": True,
        "rss_growth": True,
        "prefix_cache_bytes": True,
    }
    assert goals(result)["partials_new_p50_ms"].at_most == 2 * 7.0 + 5
    assert (result.hit_p50_ms, result.preemption_p99_ms, result.rss_growth) == (2.0, 10.0, 0.01)


def test_what_was_not_measured_is_neither_reached_nor_missed():
    result = make_report(machine(), [run("cold", 200.0)], Extras(), None)
    assert {goal.reached for goal in result.goals} == {None}
    assert "not measured  hit_p99_ms at most 10" in format_report(result)


def test_a_cache_that_passed_its_bound_misses_the_goal():
    result = make_report(machine(), [run("prefix", 1.0, max_cache_bytes=modes.MAX_CACHE_BYTES + 1)], Extras(), None)
    assert goals(result)["prefix_cache_bytes"].reached is False


def test_being_behind_the_peer_is_a_miss():
    slow = {"partials": make_row(run("partials", 50.0)), "llama.cpp+partials": make_row(run("x", 40.0))}
    nothing = dict.fromkeys(TOP_KEYS)
    missed = [goal for goal in judge(slow, nothing) if goal.reached is False]
    assert [goal.value for goal in missed] == [0.8, 0.8]


def test_a_bound_that_is_not_known_is_not_judged():
    result = make_report(machine(), [run("partials", 10.0)], Extras(), None)
    goal = goals(result)["partials_new_p50_ms"]
    assert (goal.value, goal.at_most, goal.reached) == (10.0, None, None)
    assert "not measured  partials_new_p50_ms 10, the bound comes from the mode cold" in format_report(result)


def test_a_mode_that_has_ended_is_one_line():
    assert format_progress(run("cold", 200.0)) == (
        "cold: p50 200.0, p95 200.0, p99 200.0 ms; new p50 200.0 ms; others took 1.0 %"
    )
    assert format_progress(ModeRun("cold", status="failed: x")) == "cold: failed: x"


def test_the_table_shows_every_row_and_every_goal():
    runs = every_run()
    runs[-1] = ModeRun("llama.cpp+partials", status="missing: pip install llama-cpp-python")
    shown = format_report(make_report(machine(), runs, extras(), 4.0))
    assert "llama.cpp+partials   missing: pip install llama-cpp-python" in shown
    assert "MISSED        restore_200_tokens_ms 4, at most 3" in shown
    assert "answered ahead, new" in shown
    assert "1 of 3" in shown
    assert "100.0 MB in the soak's first quarter, 101.0 MB in its last" in shown
    assert "words in real time" in shown
    assert "response_cache 25.0 %" in shown


# -- the picture ------------------------------------------------------------------------------------------------------


def test_the_picture_has_a_labelled_line_for_each_mode():
    picture = distribution_svg("A <title>", {"cold": [100.0, 120.0], "llama.cpp": [50.0], "partials": []})
    root = ElementTree.fromstring(picture)
    space = {"svg": "http://www.w3.org/2000/svg"}
    assert len(root.findall("svg:path", space)) == 2
    texts = [element.text for element in root.findall("svg:text", space)]
    assert {"A <title>", "110.0 ms  cold", "50.0 ms  llama.cpp", "50", "200", "100 %"} <= set(texts)
    assert not any("partials" in text for text in texts)


@pytest.mark.parametrize("values", [[1.0], [0.0], [5.0, 5.0], [0.3, 4000.0]])
def test_any_values_make_a_picture_within_its_frame(values):
    root = ElementTree.fromstring(distribution_svg("t", {"cold": values}))
    path = root.find("{http://www.w3.org/2000/svg}path").attrib["d"]
    steps = [float(step) for step in path.replace("M", " ").replace("H", " ").replace("V", " ").split()]
    assert all(0 <= step <= 900 for step in steps)


def test_no_values_make_no_picture():
    with pytest.raises(ValueError, match="no values"):
        distribution_svg("t", {"cold": []})


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [["--modes", "hot"], ["--queries", "0"], ["--speed", "0"], ["--speed", "-1"], ["--speed", "nan"]]
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(SystemExit) as ended:
        voice.main(arguments)
    assert ended.value.code == 2


def test_the_estimate_follows_the_trace_and_the_modes():
    trace, amounts = make_trace(20), Amounts(1.0, 0, 0, 0)
    one = voice.expected_s(trace, ["cold"], amounts)
    assert voice.expected_s(trace, ["cold", "prefix"], amounts) == 2 * one
    assert voice.expected_s(trace, ["cold"], Amounts(10.0, 0, 0, 0)) < one
    assert voice.expected_s(trace, ["speculative"], Amounts(1.0, 200, 60, 2000)) > one + 200


@pytest.mark.broker
@pytest.mark.skipif(mosquitto_path() is None, reason="mosquitto is not installed")
def test_the_whole_measurement_on_a_tiny_bundle(monkeypatch, capsys, tmp_path):
    for module in (modes, voice):
        monkeypatch.setattr(module, "SYSTEM_PROMPT", "You are a car.")
    monkeypatch.setattr(modes, "_PAIR_PAUSE_S", 0.01)
    monkeypatch.setattr(modes, "METRICS_INTERVAL_S", 0.1)
    arguments = ["--bundle", str(TINY_BUNDLE), "--cache-dir", str(tmp_path), "--json", "--modes", "cold,speculative"]
    counts = ["--queries", "6", "--speed", "100", "--hits", "2", "--pairs", "2", "--soak-queries", "8"]
    status = voice.main([*arguments, *counts, "--plot", str(tmp_path / "plot.svg")])
    result = msgspec.json.decode(capsys.readouterr().out, type=Report)
    assert status == (0 if all(goal.reached for goal in result.goals) else 1)
    assert [(row.mode, row.status, row.queries) for row in result.rows] == [("cold", "ok", 6), ("speculative", "ok", 6)]
    assert result.rows[0].sources == {"model": 1.0}
    assert result.rows[0].cached_from == {"none": 1.0}
    assert result.restore_200_tokens_ms is not None
    assert result.preemption_p99_ms is not None
    assert result.rss_growth is not None
    assert result.machine["run"]["speed"] == 100
    assert ElementTree.parse(tmp_path / "plot.svg").getroot().tag.endswith("svg")
    assert not list(tmp_path.glob(".voice-*"))


@pytest.mark.skipif(sys.platform != "linux", reason="the machine's figures are Linux's")
def test_the_share_of_others_is_a_share():
    from benchmarks.voice.client import OthersShare

    others = OthersShare()
    sum(range(2_000_000))
    assert 0.0 <= others.share() <= 1.0
