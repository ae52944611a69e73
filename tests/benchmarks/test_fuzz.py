"""The campaigns: each target for a moment, and that a fault, a hang and a crash are found, kept and gone on from."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from benchmarks.fuzz import command
from benchmarks.fuzz.campaign import FuzzError, Plan, Report, replay, run_campaign
from benchmarks.fuzz.mutation import restated_json, restated_protobuf, restated_toml
from tests.paths import TINY_BUNDLE

INPUTS = 60
GRAPH = TINY_BUNDLE / "graphs" / "cpu-int8" / "model.onnx"


def plan(name: str, folder: Path, **settings) -> Plan:
    entry = f"tests.benchmarks.fuzz_subjects:{name}"
    return Plan(name=name, entry=entry, seed=0, folder=str(folder), **{"max_inputs": 40, "seconds": 60, **settings})


@pytest.mark.parametrize("target", command.TARGETS)
def test_no_input_of_a_short_run_does_what_none_may_do(target, capsys, tmp_path):
    arguments = ["--target", target, "--inputs", str(INPUTS), "--seconds", "90", "--hang-s", "60", "--json"]
    status = command.main([*arguments, "--out", str(tmp_path)])
    (report,) = json.loads(capsys.readouterr().out)["targets"]
    assert report["findings"] == []
    assert status == 0
    assert report["inputs"] == INPUTS
    # Some are taken and some are not: the damage is neither nothing nor all.
    assert len(report["outcomes"]) >= 2
    assert not any(tmp_path.iterdir())


def test_a_sound_subject_has_outcomes_and_no_findings(tmp_path):
    report = run_campaign(plan("sound", tmp_path))
    assert report.findings == ()
    assert report.inputs == sum(report.outcomes.values()) == 40
    assert set(report.outcomes) == {"taken", "BundleError"}


@pytest.mark.parametrize(
    ("name", "kind", "what"),
    [
        ("faulty", "fault", "ValueError: none of ours"),
        ("panicking", "fault", "BaseException: as Rust does it"),
        ("greedy", "fault", "MemoryError"),
        ("crashing", "crash", "SIGSEGV"),
        ("hanging", "hang", "no end within 1 s"),
    ],
)
def test_what_fails_is_kept_and_the_campaign_goes_on(name, kind, what, tmp_path):
    # A hang takes its time.
    inputs = 25 if kind == "hang" else 40
    report = run_campaign(plan(name, tmp_path, hang_s=1.0, max_inputs=inputs))
    assert report.inputs == inputs
    assert {finding.kind for finding in report.findings} == {kind}
    assert len(report.findings) == report.count(kind) > 1
    assert len(report.findings) + sum(report.outcomes.values()) == inputs
    for finding in report.findings:
        assert what in finding.what
        assert int(Path(finding.file).read_bytes()) % 10 == 3
    found = replay(plan(name, tmp_path, hang_s=1.0, seconds=1), Path(report.findings[0].file))
    assert found.startswith(kind)


def test_a_campaign_ends_in_time_and_says_so(tmp_path):
    report = run_campaign(plan("sound", tmp_path, max_inputs=10**9, seconds=1.0))
    assert 40 < report.inputs < 10**9
    assert report.seconds < 60


def test_a_subject_that_cannot_be_made_is_no_finding(tmp_path):
    with pytest.raises(FuzzError, match="there is no sample"):
        run_campaign(plan("unmakeable", tmp_path))


def test_a_finding_is_exit_status_1_and_stands_in_the_table(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(command.TARGETS, "cache", "tests.benchmarks.fuzz_subjects:faulty")
    arguments = ["--target", "cache", "--inputs", "20", "--out", str(tmp_path)]
    assert command.main(arguments) == 1
    assert "ValueError: none of ours" in capsys.readouterr().out
    monkeypatch.setitem(command.TARGETS, "cache", "tests.benchmarks.fuzz_subjects:unmakeable")
    assert command.main(arguments) == 2
    assert "there is no sample" in capsys.readouterr().err


def test_the_table_adds_up():
    reports = [
        Report(target="a", seed=1, inputs=30, seconds=1.0, outcomes={"taken": 30}, findings=()),
        Report(target="b", seed=1, inputs=12, seconds=1.0, outcomes={"taken": 12}, findings=()),
    ]
    assert "together         42" in command.format_reports(reports)


@pytest.mark.parametrize(
    ("change", "raw"),
    [
        (restated_json, (TINY_BUNDLE / "manifest.json").read_bytes()),
        (restated_toml, b'bundle = "x"\n[mqtt]\nport = 1883\nhost = "y"\n'),
        (restated_protobuf, GRAPH.read_bytes()),
    ],
)
def test_damage_is_the_same_for_the_same_seed_and_seldom_for_another(change, raw):
    made = [change(raw, Random(f"0:{index}")) for index in range(50)]
    assert made == [change(raw, Random(f"0:{index}")) for index in range(50)]
    assert len(set(made)) > 30


def test_a_graph_changed_along_its_structure_still_parses_mostly():
    onnx = pytest.importorskip("onnx")
    raw, parsed, total = GRAPH.read_bytes(), 0, 100
    for index in range(total):
        try:
            onnx.ModelProto.FromString(restated_protobuf(raw, Random(index)))
        except Exception:
            continue
        parsed += 1
    assert parsed > total * 0.7
