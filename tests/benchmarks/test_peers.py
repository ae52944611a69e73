from __future__ import annotations

import json

import msgspec
import pytest

from benchmarks import peers
from benchmarks.lineup import MODELS, OWN, Entrant, lineup, prompt_ids
from benchmarks.peers import Report, format_report
from benchmarks.ratios import GOALS
from benchmarks.turns import Turns

FAKES = "tests.benchmarks.fake_engines"


def entrant(engine, load="load", needs=None, prepare=lambda cache_dir: cache_dir / "model"):
    return Entrant(engine, f"{FAKES}:{load}", needs or {}, prepare)


def unreadable(cache_dir):
    raise RuntimeError("the converter\nhas no disk")


@pytest.fixture
def fakes(monkeypatch):
    monkeypatch.setattr(peers, "MIN_ROUNDS", 2)
    monkeypatch.setattr("benchmarks.turns.MAX_OTHERS_CPU", 1.0)
    entrants = [
        entrant(OWN),
        entrant("ctranslate2", "load_slow"),
        entrant("optimum-onnx", needs={"no_such_module_here": "optimum-onnx", "json": "json"}),
        entrant("broken", "load_broken"),
        entrant("short", "load_short"),
        entrant("unreadable", prepare=unreadable),
    ]
    monkeypatch.setattr(peers, "lineup", lambda model: entrants)


def run(capsys, tmp_path, *arguments):
    status = peers.main(
        ["--models", "gpt2-124m", "--rounds", "2", "--threads", "2", "--cache-dir", str(tmp_path), *arguments]
    )
    return status, capsys.readouterr().out


def test_json_has_a_row_for_every_engine(fakes, capsys, tmp_path):
    status, output = run(capsys, tmp_path, "--json")
    report = msgspec.json.decode(output, type=Report)
    assert set(json.loads(output)) >= {"machine", "rows", "ratios"}
    assert status == 1  # a goal's peer is missing
    rows = {row.engine: row for row in report.rows}
    assert all(row.model == "gpt2-124m" for row in report.rows)

    own = rows[OWN]
    assert (own.status, own.version, own.same_tokens) == ("ok", "1.2", 65)
    assert 0.5 <= own.prefill_64_ms < rows["ctranslate2"].prefill_64_ms
    assert 0.5 <= own.decode_ms < rows["ctranslate2"].decode_ms
    assert own.load_s >= 0
    assert own.rss_anon_mb > 1

    assert rows["optimum-onnx"].status == "missing: pip install optimum-onnx"
    assert rows["broken"].status == "failed: ValueError: cannot read model"
    assert rows["short"].status == "failed: RuntimeError: 1 tokens were generated instead of 65"
    assert rows["unreadable"].status == "failed: has no disk"
    assert all(rows[name].decode_ms is None for name in ("optimum-onnx", "broken", "short", "unreadable"))

    assert {ratio.peer for ratio in report.ratios} == {"ctranslate2"}
    assert all(ratio.median > 1 for ratio in report.ratios)
    verdicts = {goal.peer: goal.reached for goal in report.goals}
    assert verdicts["ctranslate2"] is not None
    assert verdicts["optimum-onnx"] is None


def test_the_table_shows_machine_rows_and_goals(fakes, capsys, tmp_path):
    _, output = run(capsys, tmp_path)
    assert "edge_llm commit" in output
    assert "missing: pip install optimum-onnx" in output
    assert "failed: ValueError: cannot read model" in output
    assert "not measured  gpt2-124m: decode at least 3.5x optimum-onnx" in output


def test_chosen_engines_only(fakes, capsys, tmp_path):
    _, output = run(capsys, tmp_path, "--json", "--engines", f"{OWN},ctranslate2")
    assert [row["engine"] for row in json.loads(output)["rows"]] == [OWN, "ctranslate2"]


def test_without_this_runtime_there_are_rows_but_no_ratios():
    peer = Turns("ctranslate2", version="4", load_s=0.1, prefill_ms=[5.0], decode_ms=[1.0], token_ids=[1])
    peer.rss_anon_mb = peer.rss_file_mb = 1.0
    results = {"gpt2-124m": [Turns(OWN, status="failed: x"), peer]}
    machine = peers.describe_machine(2, ())
    report = peers.make_report(machine, 10, results)
    assert report.ratios == []
    assert [row.decode_ms for row in report.rows] == [None, 1.0]
    assert "ctranslate2" in format_report(report)


@pytest.mark.parametrize("arguments", [["--rounds", "9"], ["--models", "gpt3"]])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(SystemExit) as ended:
        peers.main(arguments)
    assert ended.value.code == 2


@pytest.mark.parametrize("model", MODELS)
def test_every_model_has_its_goals_peers_in_the_lineup(model):
    engines = [entrant.engine for entrant in lineup(model)]
    assert engines[0] == OWN
    assert len(set(engines)) == len(engines)
    assert all(goal.peer in engines for goal in GOALS if goal.model == model)


@pytest.mark.parametrize("model", MODELS)
def test_prompts_are_the_same_every_time(model):
    assert prompt_ids(model, 64) == prompt_ids(model, 64)
    assert len(prompt_ids(model, 64)) == 64
