"""``edge-llm bundle`` as a user types it; the health prompt only pretends (tests/engine/test_probe.py has the real)."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from edge_llm import bundle_command, cli
from edge_llm.bundle.store import BundleStore
from edge_llm.errors import BundleHealthError
from tests.bundle.versions import version_of
from tests.paths import TINY_BUNDLE


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a command; returns its exit status and what it has printed."""
    probed = []

    def check(store, digest, config):
        probed.append(digest)
        bundle = store.open(digest, config.bundle_keys)
        bundle.verify()
        if run.sick:
            raise BundleHealthError("it answers wrongly")
        return bundle

    def run(*arguments, key=None):
        trusted = [] if key is None else ["--set", f'bundle_keys=["{key}"]']
        status = cli.main(["bundle", *map(str, arguments), *trusted])
        said = capsys.readouterr()
        return status, said.out + said.err

    for name in [name for name in os.environ if name.startswith("EDGE_LLM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("EDGE_LLM_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr(bundle_command, "check_installed", check)
    run.sick = False
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
    monkeypatch.setattr(bundle_command, "shipped_bundle", lambda: TINY_BUNDLE)
    monkeypatch.setattr(bundle_command, "probe", lambda folder, _config: run.probed.append(folder))
    status, said = run("rollback")
    assert (status, "comes with edge_llm" in said) == (0, True)
    assert run.probed[-1] == TINY_BUNDLE
    assert (run.store.selection().current, run.store.selection().previous) == (None, two["1.0"])
    assert run("remove", "tiny@1.0")[0] == 0


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
