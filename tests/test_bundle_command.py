"""``edge-llm bundle`` as a user types it; the health prompt only pretends (tests/engine/test_probe.py has the real)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from edge_llm import cli
from edge_llm.bundle import shipped
from edge_llm.bundle.prepare import prepared_graph
from edge_llm.bundle.store import INSTALL_LOCK, BundleStore
from edge_llm.bundle_command import activate_bundle
from edge_llm.config import Config
from edge_llm.engine import probe
from edge_llm.errors import BundleHealthError
from tests.bundle.versions import version_of
from tests.paths import TINY_BUNDLE


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a command; returns its exit status and what it has printed."""
    probed = []

    def answer(folder, _config):
        probed.append(folder)
        run.meanwhile()
        if run.sick:
            raise BundleHealthError("it answers wrongly")

    def run(*arguments, key=None):
        trusted = [] if key is None else ["--set", f'bundle_keys=["{key}"]']
        status = cli.main(["bundle", *map(str, arguments), *trusted])
        said = capsys.readouterr()
        return status, said.out + said.err

    for name in [name for name in os.environ if name.startswith("EDGE_LLM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("EDGE_LLM_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("EDGE_LLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(probe, "probe", answer)
    run.sick = False
    run.meanwhile = lambda: None
    run.probed = probed
    run.store = BundleStore(tmp_path / "state" / "bundles")
    return run


@pytest.fixture
def two(run, tmp_path):
    for version in ("1.0", "2.0"):
        assert run("install", version_of(tmp_path, version))[0] == 0
    assert run("activate", "tiny@1.0")[0] == 0
    return {version: run.store.find(f"tiny@{version}") for version in ("1.0", "2.0")}


def listed(run, **options):
    return {one["version"]: one for one in json.loads(run("list", "--json", **options)[1])["bundles"]}


def test_an_empty_store_is_said(run):
    status, said = run("list")
    assert (status, "no bundles in" in said) == (0, True)
    status, said = run("rollback")
    assert (status, "no previous bundle" in said) == (1, True)


def test_the_list_says_what_there_is(run, two):
    first, second = (listed(run)[version] for version in ("1.0", "2.0"))
    assert (first["name"], first["digest"], first["current"], first["previous"]) == ("tiny", two["1.0"], True, False)
    assert first["size_bytes"] > 100_000
    assert first["signed_by"] is None
    assert first["health"]["ok"]
    assert (second["current"], second["health"]) == (False, None)
    lines = run("list")[1].splitlines()
    assert lines[1].startswith("current")
    assert "not tried" in lines[2]


def test_activate_and_roll_back(run, two):
    status, said = run("activate", "tiny@2.0")
    assert status == 0
    assert "no daemon runs" in said
    assert "has answered its health prompt" in said
    assert listed(run)["1.0"]["previous"]
    assert run("rollback")[0] == 0
    assert run.store.selection().current == two["1.0"]
    assert run.store.selection().previous == two["2.0"]


def test_from_a_first_one_it_goes_back_to_the_bundle_that_comes_along(run, two, monkeypatch):
    monkeypatch.setattr(shipped, "shipped_bundle", lambda: TINY_BUNDLE)
    status, said = run("rollback")
    assert (status, "comes with edge_llm" in said) == (0, True)
    assert run.probed[-1] == TINY_BUNDLE
    assert (run.store.selection().current, run.store.selection().previous) == (None, two["1.0"])
    assert run("remove", "tiny@1.0")[0] == 0


def test_without_one_that_comes_along_there_is_no_way_back_from_the_first(run, two, monkeypatch):
    monkeypatch.setattr(shipped, "_FOLDERS", ())
    status, said = run("rollback")
    assert (status, "no previous bundle to roll back to, and none that comes with edge_llm" in said) == (1, True)
    assert run.store.selection().current == two["1.0"]


def test_a_sick_one_that_comes_along_is_not_activated(run, two, monkeypatch):
    monkeypatch.setattr(shipped, "shipped_bundle", lambda: TINY_BUNDLE)
    run.sick = True
    status, said = run("rollback")
    assert (status, "it answers wrongly" in said) == (1, True)
    assert run.store.selection().current == two["1.0"]


@pytest.mark.parametrize("command", [("activate", "tiny@1.0"), ("rollback",), ("remove", "tiny@2.0")])
def test_of_two_commands_at_once_the_second_is_refused(run, two, command):
    seen = []
    run.meanwhile = lambda: seen.append(run(*command))
    assert run("activate", "tiny@2.0")[0] == 0
    ((status, said),) = seen
    assert (status, said.count("another command is activating or removing a bundle")) == (2, 1)
    assert run.store.selection().current == two["2.0"]
    # And afterwards it is not.
    run.meanwhile = lambda: None
    assert run("rollback")[0] == 0


def test_with_a_daemon_the_second_of_two_activations_is_refused_too(run, two):
    following = run.store.follow()
    try:
        lines = activate_bundle(Config(state_dir=str(run.store.folder.parent)), "tiny@2.0")
        assert "asking the running daemon" in next(lines)
        assert run("activate", "tiny@1.0")[0] == 2
        lines.close()
        assert run.store.selection().wanted is None
    finally:
        os.close(following)


def test_two_installations_at_once_take_turns(run, tmp_path):
    sources = [version_of(tmp_path, version) for version in ("1.0", "2.0", "3.0", "4.0")]
    with run.store.locked(INSTALL_LOCK):
        started = [
            subprocess.Popen(
                [sys.executable, "-m", "edge_llm.cli", "bundle", "install", str(source)],
                stdout=subprocess.PIPE,
                text=True,
            )
            for source in sources
        ]
    said = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0] * 4, said
    assert set(listed(run)) == {"1.0", "2.0", "3.0", "4.0"}
    assert not list(run.store.folder.glob(".incoming-*"))


@pytest.mark.parametrize(("setting", "status"), [("allow", 0), ("refuse", 1)])
def test_an_older_one_is_refused_if_the_settings_say_so(run, two, tmp_path, setting, status):
    refuse = ("--set", f"bundle_downgrade={setting}")
    assert run("activate", "tiny@2.0", *refuse)[0] == 0
    assert run("install", version_of(tmp_path, "1.9"))[0] == 0
    asked, said = run("activate", "tiny@1.9", *refuse)
    assert (asked, "tiny 1.9 is older than 2.0, which has been served here" in said) == (status, status == 1)
    if status:
        assert listed(run)["1.9"]["health"]["kind"] == "downgrade"
        # The one before may come back, and does not make others welcome.
        assert run("rollback", *refuse)[0] == 0
        assert run.store.selection().current == two["1.0"]
        assert run("activate", "tiny@1.9", *refuse)[0] == 1


def test_what_was_prepared_of_a_bundle_goes_with_it(run, two, tmp_path):
    copies = {
        version: prepared_graph(run.store.open(digest), "cpu-int8", tmp_path / "cache")
        for version, digest in two.items()
    }
    assert "and what was prepared of it" in run("remove", "tiny@2.0")[1]
    assert [copies[version].exists() for version in ("1.0", "2.0")] == [True, False]


def test_if_what_was_prepared_cannot_be_removed_it_is_said(run, two, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "prepared").symlink_to(tmp_path / "elsewhere")
    status, said = run("remove", "tiny@2.0")
    assert (status, "but not what was prepared of it: the folder of prepared copies" in said) == (0, True)
    assert set(listed(run)) == {"1.0"}


def test_a_daemon_that_does_not_say_what_became_of_it_is_not_waited_for_for_ever(run, two):
    descriptor = run.store.follow()
    try:
        limits = ("--set", "activation_timeout_s=0.1", "--set", "serving.drain_timeout_s=0.1")
        status, said = run("activate", "tiny@2.0", *limits)
    finally:
        os.close(descriptor)
    assert (status, "has not recorded within 0.3 s" in said) == (1, True)


def test_a_sick_one_is_not_activated_and_the_list_remembers_why(run, two):
    run.sick = True
    status, said = run("activate", "tiny@2.0")
    assert status == 1
    assert "it answers wrongly" in said
    assert f"the current bundle stays {two['1.0'][:12]}" in said
    assert run.store.selection().current == two["1.0"]
    assert "it answers wrongly" in run("list")[1]


def test_one_that_was_damaged_since_is_not_activated(run, two):
    (run.store.path(two["2.0"]) / "tokenizer.json").write_bytes(b"{}")
    status, said = run("activate", "tiny@2.0")
    assert (status, "tokenizer.json" in said) == (1, True)
    (run.store.path(two["2.0"]) / "manifest.json").write_bytes(b"{}")
    assert "changed since" in run("list")[1] or "not valid" in run("list")[1]


def test_install_and_activate_in_one(run, tmp_path):
    assert run("install", version_of(tmp_path, "3.0"), "--activate")[0] == 0
    assert listed(run)["3.0"]["current"]


def test_the_current_one_is_not_removed(run, two):
    status, said = run("remove", "tiny@1.0")
    assert (status, "is the current bundle" in said) == (2, True)
    assert run("remove", "tiny@2.0")[0] == 0
    assert set(listed(run)) == {"1.0"}


def test_a_setting_that_names_another_bundle_is_pointed_out(run, two):
    assert "note: the setting bundle = /opt/b" in run("activate", "tiny@2.0", "--bundle", "/opt/b")[1]


def test_signatures_are_asked_for_at_install_and_at_activation(run, tmp_path):
    pytest.importorskip("cryptography")
    from export.cli import main as export

    for name in ("fleet", "other"):
        assert export(["keygen", "--out", str(tmp_path / f"{name}.key")]) == 0
    fleet, other = (tmp_path / f"{name}.key.pub" for name in ("fleet", "other"))
    unsigned, signed = version_of(tmp_path, "1.0"), version_of(tmp_path, "2.0")
    assert export(["sign", str(signed), "--key", str(tmp_path / "fleet.key")]) == 0
    status, said = run("install", unsigned, key=fleet)
    assert (status, "is not signed" in said) == (2, True)
    assert run("install", signed, key=other)[0] == 2
    assert run.store.digests() == []
    packed = shutil.make_archive(str(tmp_path / "signed"), "gztar", signed)
    assert "signed by a trusted key" in run("install", packed, key=fleet)[1]
    assert listed(run, key=fleet)["2.0"]["signed_by"] == "fleet.key.pub"
    assert listed(run, key=other)["2.0"]["signed_by"] == "unknown"
    assert listed(run)["2.0"]["signed_by"] == "unknown"
    assert run("activate", "tiny@2.0", key=other)[0] == 1
    assert run("activate", "tiny@2.0", key=fleet)[0] == 0
    # Installed before anybody asked for signatures.
    assert run("install", unsigned)[0] == 0
    assert run("activate", "tiny@1.0", key=fleet)[0] == 1
    assert run.store.selection().current == run.store.find("tiny@2.0")
