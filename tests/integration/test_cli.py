"""The commands, as a user types them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edge_llm.cache.feedback_log import FeedbackEntry, FeedbackLog
from edge_llm.cache.popularity import Popularity
from edge_llm.cache.prefix_lint import PrefixLint
from edge_llm.cache.response_cache import CachedResponse, ResponseCache
from edge_llm.cache.state_db import StateDb, state_path
from edge_llm.config import load_config
from edge_llm.doctor import Check, run_doctor
from tests.brokers import free_port
from tests.paths import TINY_BUNDLE

ROOT = Path(__file__).parent.parent.parent


def edge_llm(*arguments: str, cache: Path | None = None, timeout_s: float = 90) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("EDGE_LLM_")}
    if cache is not None:
        environ["XDG_CACHE_HOME"] = str(cache)
    command = [sys.executable, "-m", "edge_llm.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environ, check=False)


@pytest.fixture
def running(mosquitto, start_daemon, connect):
    start_daemon(mosquitto.port)
    connect(mosquitto.port)
    return mosquitto.port


@pytest.mark.broker
def test_ask_streams_the_answer(running):
    result = edge_llm("ask", "hello", "--port", str(running))
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


@pytest.mark.broker
@pytest.mark.parametrize("flags", [(), ("--mqtt3",)])
def test_ask_prints_events_as_json(running, flags):
    result = edge_llm("ask", "hello", "--json", "--port", str(running), *flags)
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert [event["seq"] for event in events] == list(range(len(events)))
    assert events[-1]["type"] == "final"


@pytest.mark.broker
def test_ask_reports_an_error_event(running):
    result = edge_llm("ask", "word " * 400, "--port", str(running))
    assert result.returncode == 1
    assert "413 too_long" in result.stderr


def test_ask_without_a_broker_says_so_in_one_line():
    result = edge_llm("ask", "hello", "--port", str(free_port()))
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "Is the broker running" in result.stderr


@pytest.mark.broker
def test_ask_without_a_daemon_says_so_in_one_line(mosquitto):
    result = edge_llm("ask", "hello", "--port", str(mosquitto.port))
    assert result.returncode == 2
    assert "start `edge-llm serve`" in result.stderr


def test_bench_prints_figures(tmp_path):
    result = edge_llm("bench", "--bundle", str(TINY_BUNDLE), "--rounds", "2", "--json", cache=tmp_path)
    figures = json.loads(result.stdout)
    assert figures.keys() >= {"load_s", "rss_anon_mb", "prefill_ms", "decode_ms", "python_overhead_ms"}
    assert set(figures["prefill_ms"]) == {"16", "64"}
    assert 0 < figures["decode_ms"]["p50"] <= figures["decode_ms"]["p99"]
    assert 0 < figures["python_overhead_ms"] < figures["decode_ms"]["p99"]
    text = edge_llm("bench", "--bundle", str(TINY_BUNDLE), "--rounds", "2", cache=tmp_path).stdout
    assert "ms/token" in text


@pytest.mark.broker
def test_doctor_is_content(mosquitto, tmp_path):
    result = edge_llm("doctor", "--bundle", str(TINY_BUNDLE), "--port", str(mosquitto.port), cache=tmp_path)
    assert result.returncode == 0, result.stdout
    assert "every hash matches" in result.stdout
    assert "the first token is the expected one" in result.stdout


def test_doctor_names_what_fails(tmp_path):
    folder = Path(shutil.copytree(TINY_BUNDLE, tmp_path / "bundle"))
    data = folder / "graphs" / "cpu-int8" / "model.onnx.data"
    data.write_bytes(data.read_bytes()[::-1])
    result = edge_llm("doctor", "--json", "--bundle", str(folder), "--port", str(free_port()), cache=tmp_path)
    assert result.returncode == 1
    report = json.loads(result.stdout)
    assert not report["ok"]
    failed = {check["name"]: check["detail"] for check in report["checks"] if check["ok"] is False}
    assert set(failed) == {"broker", "bundle", "answer"}
    assert "does not match its SHA-256" in failed["bundle"]


def test_prepare_builds_the_copy(tmp_path):
    result = edge_llm("prepare", "--bundle", str(TINY_BUNDLE), cache=tmp_path)
    assert result.returncode == 0
    assert list(tmp_path.rglob("prepared.json"))


def remember(folder: Path) -> None:
    """What a daemon would have kept below the user's cache folder."""
    (folder / "edge-llm" / "prefixes").mkdir(parents=True)
    (folder / "edge-llm" / "prefixes" / "one.kv").write_bytes(bytes(1000))
    with contextlib.closing(StateDb.open(state_path(folder / "edge-llm"))) as db:
        responses = ResponseCache(db, scope="scope", max_entries=10, max_bytes=1 << 20)
        popularity = Popularity(db)
        feedback = FeedbackLog(db, 10)
        lint = PrefixLint(db)
        for user in ("ann", "bob"):
            responses.put(user, b"key", CachedResponse("Yes.", "stop", 3, 2))
            popularity.record(user, "Is it far?")
            feedback.record(FeedbackEntry(user, "refused", "Is it wet?", "refusal", "[]", "No."))
            for time in (11, 12, 13):
                lint.observe(user, [*range(20), time + 100, *range(20)], lambda ids: f"{ids[0] - 100}:00")
        assert responses.find("ann", b"key")


def test_cache_info_shows_what_is_kept(tmp_path):
    remember(tmp_path)
    result = edge_llm("cache", "info", "--json", cache=tmp_path)
    assert result.returncode == 0, result.stderr
    info = json.loads(result.stdout)
    assert info["path"] == str(tmp_path / "edge-llm" / "state.sqlite3")
    assert info["size_bytes"] > 0
    assert (info["responses"]["entries"], info["responses"]["hits"]) == (2, 1)
    assert info["popular"] == {"ann": 1, "bob": 1}
    assert [(finding["user"], finding["position"], finding["count"]) for finding in info["findings"]] == [
        ("bob", 20, 2),
        ("ann", 20, 2),
    ]
    assert info["prefixes"] == {"files": 1, "nbytes": 1000}
    lines = edge_llm("cache", "info", cache=tmp_path).stdout.splitlines()
    assert "responses  2, 0.00 MB, 1 hits" in lines
    assert any('varies from token 20 on ("13:00")' in line for line in lines)


def test_cache_info_makes_nothing_where_nothing_is(tmp_path):
    result = edge_llm("cache", "info", "--json", cache=tmp_path)
    assert json.loads(result.stdout)["responses"] == {"entries": 0, "nbytes": 0, "hits": 0}
    assert edge_llm("cache", "clear", cache=tmp_path).returncode == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "left", "removed"),
    [
        (
            [],
            (0, 0, 0, 0),
            ["2 responses", "2 popular queries", "2 feedback entries", "2 findings", "1 prefix snapshots"],
        ),
        (
            ["--user", "ann"],
            (1, 1, 1, 1),
            ["1 responses of ann", "1 popular queries of ann", "1 feedback entries of ann", "1 findings of ann"],
        ),
        (["--feedback"], (2, 2, 2, 1), ["2 feedback entries"]),
        (["--responses"], (0, 2, 2, 1), ["2 responses"]),
        (["--popular", "--user", "ann"], (2, 1, 2, 1), ["1 popular queries of ann"]),
        (["--prefixes"], (2, 2, 2, 0), ["1 prefix snapshots"]),
    ],
)
def test_cache_clear_removes_what_is_named(tmp_path, flags, left, removed):
    remember(tmp_path)
    with contextlib.closing(StateDb.open(state_path(tmp_path / "edge-llm"))):  # as if a daemon were running
        result = edge_llm("cache", "clear", *flags, cache=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"removed {what}" for what in removed]
    info = json.loads(edge_llm("cache", "info", "--json", cache=tmp_path).stdout)
    kept = (info["responses"]["entries"], len(info["popular"]), len(info["findings"]), info["prefixes"]["files"])
    assert kept == left


def test_cache_clear_that_fails_says_so(tmp_path):
    remember(tmp_path)
    path = state_path(tmp_path / "edge-llm")
    path.unlink()
    path.mkdir()
    result = edge_llm("cache", "clear", cache=tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "cannot be used" in result.stderr


def test_doctor_reports_prompts_that_vary(tmp_path):
    config = load_config(flags={"cache_dir": str(tmp_path / "edge-llm"), "mqtt": {"port": free_port()}})
    checks = {check.name: check for check in run_doctor(config)}
    assert checks["prefix"] == Check("prefix", True, "no prompt varied near its head")
    remember(tmp_path)
    checks = {check.name: check for check in run_doctor(config)}
    assert checks["prefix"].ok is None
    assert 'the prompt varies from token 20 on ("13:00"): 21 tokens a query' in checks["prefix"].detail


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cache"], "COMMAND"),
        (["cache", "clear", "--user", "ann", "--prefixes"], "belong to no user"),
        (["serve", "--bundle", "/no/such/folder"], "no bundle at /no/such/folder"),
        (["bench", "--bundle", str(TINY_BUNDLE), "--set", "engine.slots=0"], "engine.slots"),
        (["bench", "--bundle", str(TINY_BUNDLE), "--set", "engine.slot=1"], "unknown field `slot`"),
        (["bench", "--bundle", str(TINY_BUNDLE), "--set", "engine"], "write KEY=VALUE"),
        (["bench", "--bundle", str(TINY_BUNDLE), "--device", "toaster"], "no device file for 'toaster'"),
        (["doctor", "--config", "/no/such/file.toml"], "cannot read /no/such/file.toml"),
        (["bench", "--bundle", str(TINY_BUNDLE), "--rounds", "0"], "'0' is not a whole number of at least 1"),
        (["bench", "--set", "mqtt=5", "--set", "mqtt.host=h"], "mqtt is a setting, not a table"),
        (["ask", "hi", "--timeout-s", "-1"], "'-1' is not a number of at least 0"),
        (["ask", "hi", "--temperature", "nan"], "'nan' is not a number of at least 0"),
        (["ask", "\udcff"], "the text is not UTF-8"),
        (["dance"], "invalid choice: 'dance'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message):
    result = edge_llm(*arguments)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_demo_that_is_stopped_leaves_nothing(tmp_path, how):
    command = [sys.executable, "-m", "edge_llm.cli", "demo", "--interactive", "--bundle", str(TINY_BUNDLE)]
    environ = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    demo = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ)
    assert demo.stdout is not None
    lines = []
    while not lines or "Ask away" not in lines[-1]:
        lines.append(demo.stdout.readline())
    pid = int("".join(lines).split("(process ")[1].split(")")[0])
    assert Path(f"/proc/{pid}").exists()
    demo.send_signal(how)
    demo.wait(30)
    assert not Path(f"/proc/{pid}").exists()
    assert not list(tmp_path.glob("edge-llm-demo-*"))


def test_the_demo_answers_six_questions_and_leaves_nothing(tmp_path):
    result = edge_llm("demo", "--bundle", str(TINY_BUNDLE), cache=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n> ") == 6
    assert "ms/token" in result.stdout
    assert "cancelled half-way" in result.stdout
    pid = int(result.stdout.split("(process ")[1].split(")")[0])
    assert not Path(f"/proc/{pid}").exists()
