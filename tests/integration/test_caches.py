"""The caches and prefetch through a daemon and a broker: what a client sees, and what a restart leaves."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time

import pytest

from edge_llm.cache.response_cache import response_stats
from edge_llm.cache.state_db import StateDb, state_path
from tests.brokers import wait_offline
from tests.paths import TINY_BUNDLE

pytestmark = pytest.mark.broker

SYSTEM = "You are the voice of a car. Answer in one short sentence."
SETTINGS = (f'serving.system_prompt="{SYSTEM}"', "serving.metrics_interval_s=0.2")


def ask(client, text, **fields):
    return client.ask(text, max_tokens=4, **fields)


def speak(client, text, utterance="u"):
    words = text.split()
    for end in range(1, len(words)):
        client.partial(utterance, end, " ".join(words[:end]))
        time.sleep(0.02)


def wait_for_file(folder, suffix):
    deadline = time.monotonic() + 20
    while not list(folder.glob(f"*{suffix}")):
        assert time.monotonic() < deadline, f"no {suffix} file came"
        time.sleep(0.05)


def wait_until_written(path, answers):
    deadline = time.monotonic() + 20
    with contextlib.closing(StateDb.open(path)) as db:
        while response_stats(db).entries < answers:
            assert time.monotonic() < deadline, "the answers never reach the disk"
            time.sleep(0.05)


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_transcript_is_prefilled_while_it_grows(mosquitto, start_daemon, connect, protocol):
    start_daemon(mosquitto.port, *SETTINGS)
    ann, bob = (connect(mosquitto.port, user=user, mqtt={"protocol": protocol}) for user in ("ann", "bob"))
    text = "how far is it to the coast and where can I charge"
    speak(ann, text)
    time.sleep(0.3)  # the last word settles
    other = ask(bob, text, utterance="u")
    assert other["usage"]["cached_from"] != "partial"
    final = ask(ann, text, utterance="u")
    assert final["usage"]["cached_from"] == "partial"
    assert final["usage"]["cached_tokens"] > other["usage"]["cached_tokens"]
    assert final["text"] == other["text"]
    assert final["source"] == "model"


def test_a_pause_is_answered_ahead_and_only_to_its_query(mosquitto, start_daemon, connect):
    start_daemon(mosquitto.port, *SETTINGS)
    client = connect(mosquitto.port)
    cold = ask(client, "open the window", cache="bypass")
    for seq in (1, 2):
        client.partial("u", seq, "open the window")
    time.sleep(0.5)
    final = ask(client, "Open the window!", utterance="u")
    assert final["source"] == "prefetch"
    assert final["text"] == cold["text"]
    for seq in (1, 2):
        client.partial("v", seq, "open the door")
    time.sleep(0.5)
    assert ask(client, "open the roof", utterance="v")["source"] == "model"


def test_answers_survive_a_restart_and_a_kill(mosquitto, start_daemon, connect, tmp_path):
    daemon = start_daemon(mosquitto.port, *SETTINGS)
    client = connect(mosquitto.port)
    first = ask(client, "What is MQTT?")
    assert first["source"] == "model"
    again = ask(client, "what is  mqtt")
    assert (again["source"], again["text"]) == ("response_cache", first["text"])
    assert ask(client, "What is MQTT?", cache="bypass")["source"] == "model"
    assert ask(connect(mosquitto.port, user="bob"), "What is MQTT?")["source"] == "model"
    assert daemon.stop() == 0
    daemon.start()
    client.wait_online(60)
    assert ask(client, "What is MQTT?")["source"] == "response_cache"
    daemon.kill()
    wait_offline(client, 30)
    daemon.start()
    client.wait_online(60)
    assert ask(client, "What is MQTT?")["source"] == "response_cache"
    daemon.stop()
    other = start_daemon(mosquitto.port, 'serving.system_prompt="Answer like a pirate."', node="other")
    assert ask(connect(mosquitto.port, node="other"), "What is MQTT?")["source"] == "model"
    other.stop()


def test_the_system_prompt_is_warm_after_a_restart(mosquitto, start_daemon, connect, tmp_path):
    daemon = start_daemon(mosquitto.port, *SETTINGS)
    client = connect(mosquitto.port)
    prefixes = tmp_path / "cache" / "prefixes"
    wait_for_file(prefixes, ".kv")
    cold = ask(client, "What is MQTT?", cache="bypass")
    daemon.kill()
    wait_offline(client, 30)
    daemon.start()
    client.wait_online(60)
    final = ask(client, "What is MQTT?")
    assert final["usage"]["cached_from"] == "snapshot"
    assert final["usage"]["cached_tokens"] > 30
    assert final["text"] == cold["text"]
    daemon.stop()
    (snapshot,) = prefixes.glob("*.kv")
    damaged = bytearray(snapshot.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    snapshot.write_bytes(damaged)
    daemon.start()
    client.wait_online(60)
    assert ask(client, "Why is the sky blue?")["usage"]["cached_from"] != "snapshot"
    assert daemon.log().count(str(snapshot.name)) == 1
    wait_for_file(prefixes, ".kv")  # it is computed and saved again


def test_everything_switched_off_is_cold(mosquitto, start_daemon, connect, tmp_path):
    off = ("cache.prefix=false", "cache.responses=false", "prefetch.popularity=false")
    start_daemon(mosquitto.port, *SETTINGS, *off)
    client = connect(mosquitto.port)
    for _ in range(2):
        speak(client, "how far is it to the coast")
        final = ask(client, "how far is it to the coast", utterance="u")
        assert (final["source"], final["usage"]["cached_tokens"]) == ("model", 0)
    assert not list((tmp_path / "cache" / "prefixes").glob("*"))


def test_a_state_that_cannot_be_kept_costs_nothing_but_itself(mosquitto, start_daemon, connect, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    daemon = start_daemon(mosquitto.port, *SETTINGS, f"state_dir={tmp_path / 'file'}")
    client = connect(mosquitto.port)
    assert ask(client, "What is MQTT?")["source"] == "model"
    assert ask(client, "What is MQTT?")["source"] == "response_cache"
    assert "Traceback" not in daemon.log()


def test_a_user_can_be_erased_while_the_daemon_runs(mosquitto, start_daemon, connect, tmp_path):
    start_daemon(mosquitto.port, *SETTINGS)
    ann, bob = (connect(mosquitto.port, user=user) for user in ("ann", "bob"))
    for client in (ann, bob):
        ask(client, "What is MQTT?")
        assert ask(client, "What is MQTT?")["source"] == "response_cache"
    # What still waits for the disk when somebody erases is dropped with it.
    wait_until_written(state_path(tmp_path / "cache"), 2)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("EDGE_LLM_")}
    command = [sys.executable, "-m", "edge_llm.cli", "cache", "clear", "--user", "ann"]
    command += ["--set", f"cache_dir={tmp_path / 'cache'}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environ)
    assert result.returncode == 0, result.stderr
    assert ask(ann, "What is MQTT?")["source"] == "model"
    assert ask(bob, "What is MQTT?")["source"] == "response_cache"


def test_the_bundle_is_served_without_partials_by_a_client_that_sends_none(mosquitto, start_daemon, connect):
    start_daemon(mosquitto.port, bundle=TINY_BUNDLE)
    client = connect(mosquitto.port)
    first = ask(client, "Tell me about the sea", session="s")
    time.sleep(0.3)
    second = ask(client, "And the mountains", session="s")
    assert second["usage"]["cached_tokens"] > first["usage"]["prompt_tokens"]
