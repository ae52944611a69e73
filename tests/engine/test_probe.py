"""A health prompt in a process of its own: what it tells, and that nothing of it comes back here."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import msgspec
import pytest

from edge_llm.config import Config, EngineConfig
from edge_llm.engine import probe as probing
from edge_llm.engine.probe import probe
from edge_llm.errors import BundleError, BundleHealthError, MemoryPlanError
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
    monkeypatch.setattr(sys, "executable", str(path))


def test_one_that_crashes_costs_only_its_own_process(config, tmp_path, monkeypatch):
    child(tmp_path, monkeypatch, "cat > /dev/null; kill -SEGV $$")
    with pytest.raises(BundleHealthError, match=r"ends the process \(SIGSEGV\)"):
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
    from tests.brokers import wait_for

    status = Path(f"/proc/{pid}/stat")
    wait_for(lambda: not status.exists() or status.read_text().split()[2] == "Z", 10)
    return True


def test_one_that_is_killed_may_lack_memory_and_is_not_refused_for_ever(config, tmp_path, monkeypatch):
    child(tmp_path, monkeypatch, "cat > /dev/null; kill -KILL $$")
    with pytest.raises(MemoryPlanError, match="ended by SIGKILL, as the kernel does when memory runs out"):
        probe(TINY_BUNDLE, config)


def test_a_signal_without_a_name_is_told_by_its_number(config, tmp_path, monkeypatch):
    child(tmp_path, monkeypatch, "cat > /dev/null; kill -40 $$")
    with pytest.raises(BundleHealthError, match=r"ends the process \(signal 40\)"):
        probe(TINY_BUNDLE, config)


@pytest.mark.parametrize("said", ["", "{}", '{"digest": "0000"}'])
def test_an_exit_status_of_0_is_no_answer(config, tmp_path, monkeypatch, said):
    child(tmp_path, monkeypatch, f"cat > /dev/null; echo '{said}'; exit 0")
    with pytest.raises(BundleHealthError, match="without saying that it has answered"):
        probe(TINY_BUNDLE, config)


def test_nothing_is_imported_from_the_folder_it_is_asked_in(config, tmp_path, monkeypatch):
    (tmp_path / "edge_llm").mkdir()
    (tmp_path / "edge_llm" / "__init__.py").write_text("raise SystemExit(0)")
    shutil.copytree(TINY_BUNDLE, tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    probe(Path("tiny"), msgspec.structs.replace(config, cache_dir="cache"))


def test_it_is_what_the_kernel_ends_when_memory_runs_out(tmp_path, monkeypatch):
    """Its own score for that is the highest there is before it has read what it is asked."""
    python = sys.executable
    say = (
        "from edge_llm.engine import probe; probe.sys.stdin.close(); "
        "score = open('/proc/self/oom_score_adj').read; "
        f"probe.configure_logging = lambda *_: open('{tmp_path}/score', 'w').write(score()); "
        "probe.main()"
    )
    child(tmp_path, monkeypatch, f'"{python}" -c "{say}"')
    with pytest.raises(BundleHealthError):
        probe(TINY_BUNDLE, Config())
    assert (tmp_path / "score").read_text().strip() == "1000"


@pytest.mark.parametrize("said", ["", "no json", '{"error": "SystemExit", "message": "x"}'])
def test_whatever_it_says_it_is_one_of_our_errors(config, tmp_path, monkeypatch, said):
    child(tmp_path, monkeypatch, f"cat > /dev/null; echo '{said}'; exit 3")
    with pytest.raises(BundleHealthError):
        probe(TINY_BUNDLE, config)
