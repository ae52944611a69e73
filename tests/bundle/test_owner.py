"""``edge-llm bundle`` under sudo: a store of the daemon's user, below a folder that only root can enter."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from edge_llm.bundle.owner import as_owner
from edge_llm.bundle.prepare import prepared_graph
from edge_llm.bundle.store import BundleStore, Health
from edge_llm.bundle_command import activate_bundle, install_bundle, list_bundles, remove_bundle
from edge_llm.config import Config
from edge_llm.errors import BundleError, BundleHealthError, ConfigError
from tests.brokers import wait_for
from tests.bundle.versions import version_of

NOBODY = 65534
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture
def state(tmp_path):
    """As systemd lays out the state folder with DynamicUser=; the link, as it is named in the settings."""
    private = tmp_path / "private"
    (private / "edge-llm").mkdir(parents=True, mode=0o755)
    private.chmod(0o700)
    os.chown(private / "edge-llm", NOBODY, NOBODY)
    (tmp_path / "edge-llm").symlink_to(private / "edge-llm")
    return tmp_path / "edge-llm"


@pytest.fixture
def source():
    """A bundle that everybody can read."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield version_of(Path(folder), "1.0")


@root_only
def test_a_bundle_is_installed_listed_and_removed_as_the_owner(state, source, monkeypatch):
    config = Config(state_dir=str(state))
    monkeypatch.chdir(source.parent)
    digest, said = install_bundle(config, Path(source.name))
    assert said.startswith("installed: tiny 1.0")
    assert {path.stat().st_uid for path in (state / "bundles").rglob("*")} == {NOBODY}
    assert [one.digest for one in list_bundles(config)] == [digest]
    with pytest.raises(BundleError, match="no bundle 'other'"):
        remove_bundle(config, "other")
    assert remove_bundle(config, "tiny") == f"removed {digest[:12]}"
    assert os.geteuid() == 0
    assert Path.cwd() == source.parent


@root_only
def test_what_ends_the_command_ends_its_other_process_too(state, source, tmp_path):
    """It may hold the store's locks."""
    store = BundleStore(state / "bundles")
    install_bundle(Config(state_dir=str(state)), source)
    following = store.follow()  # as a daemon that is busy
    for path in store.folder.iterdir():
        os.chown(path, NOBODY, NOBODY)
    settings = tmp_path / "config.toml"
    settings.write_text(f'state_dir = "{state}"\ncache_dir = "{tmp_path / "cache"}"\n')
    command = [sys.executable, "-m", "edge_llm.cli", "bundle", "activate", "tiny", "--config", str(settings)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: store.selection().wanted is not None, 60)
        (other,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.terminate()
    os.close(following)
    assert process.returncode == 128 + signal.SIGTERM
    assert not Path(f"/proc/{other}").exists()


@root_only
def test_what_was_prepared_is_removed_as_the_owner(state, source, tmp_path):
    config = Config(state_dir=str(state), cache_dir=str(tmp_path / "cache"))
    digest, _ = install_bundle(config, source)
    copy = prepared_graph(BundleStore(state / "bundles").open(digest), "cpu-int8", tmp_path / "cache")
    # Another user's, below a folder that only root can enter, as with CacheDirectory=.
    for path in (tmp_path / "cache", *(tmp_path / "cache").rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    tmp_path.chmod(0o700)
    assert remove_bundle(config, "tiny") == f"removed {digest[:12]}, and what was prepared of it"
    assert not copy.parent.exists()


@root_only
def test_a_bundle_that_the_owner_cannot_read_is_said(state, tmp_path):
    with pytest.raises(ConfigError, match="the owner of the bundle store cannot read"):
        install_bundle(Config(state_dir=str(state)), version_of(tmp_path, "1.0"))


@root_only
def test_root_is_given_up_for_good(state):
    def work(store, is_anothers):
        with contextlib.suppress(PermissionError):
            os.setresuid(0, 0, 0)
        yield json.dumps([*os.getresuid(), *os.getresgid(), *os.getgroups(), is_anothers])

    (said,) = as_owner(Config(state_dir=str(state)), work)
    assert json.loads(said) == [NOBODY] * 6 + [True]


@root_only
def test_an_end_without_a_result_is_no_success(state):
    def work(store, is_anothers):
        yield "begun"
        os.kill(os.getpid(), signal.SIGKILL)

    lines = as_owner(Config(state_dir=str(state)), work)
    assert next(lines) == "begun"
    with pytest.raises(ConfigError, match=r"before it was done \(SIGKILL\)"):
        next(lines)


@root_only
def test_without_the_daemon_another_users_store_is_only_pointed_out(state, source):
    config = Config(state_dir=str(state))
    digest, _ = install_bundle(config, source)
    with pytest.raises(ConfigError, match="no daemon runs"):
        list(activate_bundle(config, digest))
    selection = BundleStore(state / "bundles").selection()
    assert (selection.current, selection.wanted, selection.health) == (None, None, {})


@root_only
def test_a_running_daemon_is_asked(state, source, monkeypatch):
    config = Config(state_dir=str(state))
    digest, _ = install_bundle(config, source)
    store = BundleStore(state / "bundles")
    following = store.follow()
    os.chown(state / "bundles" / ".daemon.lock", NOBODY, NOBODY)
    lines = activate_bundle(config, digest)
    assert "asking the running daemon" in next(lines)
    while store.selection().wanted is None:
        pass
    # The daemon's part.
    store.refused(digest, Health.failed(BundleHealthError("it answers wrongly")))
    os.chown(state / "bundles" / "selection.json", NOBODY, NOBODY)
    with pytest.raises(BundleError, match="it answers wrongly"):
        list(lines)
    os.close(following)


def test_a_store_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "bundles").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="is a link"):
        remove_bundle(Config(state_dir=str(tmp_path)), "tiny")
    assert list((tmp_path / "elsewhere").iterdir()) == []
