"""What a daemon leaves of a user's words: nothing on disk with strict privacy, nothing anywhere after ``forget``."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edge_llm.cache.state_db import state_path
from tests.bundle.test_signature import copy, key, public, signed  # noqa: F401 - fixtures
from tests.integration.test_caches import SETTINGS, ask, speak, wait_until_written

pytestmark = pytest.mark.broker

MARKER = "Quetzalcoatlus"
# What varies from query to query is shown in the log, unless privacy is strict.
SYSTEMS = [
    f"You are a guide of the zoo and speak to {name}, who has come on a rainy day with the family to see it."
    for name in (f"{MARKER}x", f"The {MARKER} y", f"A {MARKER}z")
]
STRICT = ("privacy=strict", "log_level=debug")
FEEDBACK = ("feedback.enabled=true",)


def say_everything(client):
    """In every way there is: as a question, as partials, in a session, as a system message."""
    for _ in range(2):
        assert ask(client, f"Where does the {MARKER} live?")["text"]
    speak(client, f"is the {MARKER} a bird or not")
    ask(client, f"is the {MARKER} a bird or not", utterance="u")
    for turn in ("first", "second"):
        ask(client, f"The {turn} time I saw a {MARKER}", session="s")
    for system in SYSTEMS:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": "Hello"}]
        client.ask(messages=messages, max_tokens=4)


def files_with_marker(folder: Path) -> list[Path]:
    needle = MARKER.lower().encode()
    return [path for path in folder.rglob("*") if path.is_file() and needle in path.read_bytes().lower()]


def run_cli(*arguments, folder):
    environ = {name: value for name, value in os.environ.items() if not name.startswith("EDGE_LLM_")}
    command = [sys.executable, "-m", "edge_llm.cli", *arguments, "--set", f"cache_dir={folder / 'cache'}"]
    command += ["--set", f"state_dir={folder / 'state'}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environ)


def wait_until(condition, what):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def test_strict_privacy_leaves_no_word_on_disk(mosquitto, start_daemon, connect, tmp_path):
    state = f"state_dir={tmp_path / 'state'}"
    client = connect(mosquitto.port, online=False)
    normal = start_daemon(mosquitto.port, *SETTINGS, state)
    client.wait_online(60)
    say_everything(client)
    wait_until_written(state_path(tmp_path / "state"), 1)
    assert normal.stop() == 0
    assert files_with_marker(tmp_path / "state"), "the marker would not be found if it were there"
    assert MARKER in normal.log()
    normal.log_path.unlink()

    strict = start_daemon(mosquitto.port, *SETTINGS, state, *STRICT)
    client.wait_online(60)
    say_everything(client)
    assert ask(client, f"Where does the {MARKER} live?")["source"] == "response_cache"  # from memory
    assert strict.stop() == 0
    assert not files_with_marker(tmp_path / "state")
    assert not files_with_marker(tmp_path / "cache")
    assert not state_path(tmp_path / "state").exists()
    assert MARKER not in strict.log()
    assert "what was kept of earlier queries is deleted" in strict.log()

    strict.start()
    client.wait_online(60)
    assert ask(client, f"Where does the {MARKER} live?")["source"] == "model"


@pytest.mark.parametrize("privacy", ["normal", "strict"])
def test_forget_reaches_disk_and_memory_of_one_user_alone(mosquitto, start_daemon, connect, tmp_path, privacy):
    folder = tmp_path / "state"
    settings = FEEDBACK if privacy == "normal" else STRICT
    daemon = start_daemon(mosquitto.port, *SETTINGS, *settings, f"state_dir={folder}")
    ann, bob = connect(mosquitto.port), connect(mosquitto.port, user="bob")
    say_everything(ann)
    ask(bob, "My name is Bob", session="s")
    turn = ask(bob, "And what is yours?", session="s", cache="bypass")
    answered = ask(ann, f"One more {MARKER}", cache="bypass")
    if privacy == "normal":
        wait_until_written(state_path(folder), 3)
        assert files_with_marker(folder)

    result = run_cli("forget", "ann", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    time.sleep(1.5)  # the daemon looks twice a second, and the engine's thread is told
    assert not files_with_marker(folder)
    assert "ann" not in (folder / "erasures").read_text()
    assert ask(ann, f"Where does the {MARKER} live?", cache="bypass")["usage"]["cached_from"] != "tree"
    first = ask(ann, "Who am I?", session="s", cache="bypass")
    fresh = ask(ann, "Who am I?", session="other", cache="bypass")
    assert first["usage"]["prompt_tokens"] == fresh["usage"]["prompt_tokens"], "the conversation is remembered"
    goes_on = ask(bob, "And what is yours?", session="s", cache="bypass")
    assert goes_on["usage"]["prompt_tokens"] > turn["usage"]["prompt_tokens"], "bob's conversation is lost"
    ann.rate(answered["id"], 1)  # of an answer that is forgotten: nothing is written
    assert daemon.stop() == 0
    assert not files_with_marker(folder)
    assert not files_with_marker(tmp_path / "cache")
    assert "Traceback" not in daemon.log()


def test_forget_before_any_daemon_has_run_makes_nothing(tmp_path):
    result = run_cli("forget", "ann", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "removed 0 responses of ann" in result.stdout
    assert not (tmp_path / "state").exists()


def test_a_daemon_serves_what_is_signed_and_nothing_else(mosquitto, start_daemon, connect, signed, copy, public):  # noqa: F811
    trusted = f'bundle_keys=["{public}"]'
    daemon = start_daemon(mosquitto.port, trusted, bundle=signed)
    assert ask(connect(mosquitto.port), "What is MQTT?")["text"]
    assert daemon.stop() == 0
    manifest = signed / "manifest.json"
    manifest.write_bytes(manifest.read_bytes() + b"\n")
    daemon.start()
    assert daemon.process.wait(60) == 2
    (line,) = [line for line in daemon.log().splitlines() if line.startswith("edge-llm: ")]
    assert "by no trusted key" in line
