"""A health prompt in a process of its own: what it tells, and that nothing of it comes back here."""

from __future__ import annotations

import sys

import pytest

from edge_llm.config import Config, EngineConfig
from edge_llm.engine import probe as probing
from edge_llm.engine.probe import probe
from edge_llm.errors import BundleError, BundleHealthError
from tests.bundle.versions import unhealthy
from tests.paths import TINY_BUNDLE


@pytest.fixture
def config(tmp_path):
    return Config(cache_dir=str(tmp_path / "cache"), engine=EngineConfig(threads=1, prepare=False))


def test_a_bundle_that_answers_passes(config):
    probe(TINY_BUNDLE, config)


def test_one_that_answers_wrongly_does_not(config, tmp_path):
    with pytest.raises(BundleError, match="does not generate the token recorded at export"):
        probe(unhealthy(tmp_path, "2.0"), config)


def child(tmp_path, monkeypatch, script):
    path = tmp_path / "child"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o700)
    monkeypatch.setattr(probing, "sys", type("Fake", (), {"executable": str(path), "platform": sys.platform}))


def test_one_that_crashes_costs_only_its_own_process(config, tmp_path, monkeypatch):
    child(tmp_path, monkeypatch, "cat > /dev/null; kill -SEGV $$")
    with pytest.raises(BundleHealthError, match=r"ends the process \(signal SIGSEGV\)"):
        probe(TINY_BUNDLE, config)


def test_one_that_hangs_is_ended_with_its_children(config, tmp_path, monkeypatch):
    child(tmp_path, monkeypatch, f"sleep 600 & echo $! > {tmp_path}/grandchild; wait")
    monkeypatch.setattr(probing, "_end", ending(probing._end, tmp_path / "grandchild"))
    with pytest.raises(BundleHealthError, match=r"activation_timeout_s = 0\.2 s"):
        probe(TINY_BUNDLE, Config(activation_timeout_s=0.2))
    assert is_gone(int((tmp_path / "grandchild").read_text()))


def ending(end, written):
    def after_it_is_there(process):
        from tests.brokers import wait_for

        wait_for(lambda: written.exists() and bool(written.read_text().strip()), 30)
        end(process)

    return after_it_is_there


def is_gone(pid):
    from pathlib import Path

    from tests.brokers import wait_for

    status = Path(f"/proc/{pid}/stat")
    wait_for(lambda: not status.exists() or status.read_text().split()[2] == "Z", 10)
    return True


@pytest.mark.parametrize("said", ["", "no json", '{"error": "SystemExit", "message": "x"}'])
def test_whatever_it_says_it_is_one_of_our_errors(config, tmp_path, monkeypatch, said):
    child(tmp_path, monkeypatch, f"cat > /dev/null; echo '{said}'; exit 3")
    with pytest.raises(BundleHealthError):
        probe(TINY_BUNDLE, config)
