"""Which bundle is served, and what a start does when it has gone wrong before."""

from __future__ import annotations

import json

import pytest

from edge_llm.bundle.incoming import install
from edge_llm.bundle.manifest import Bundle
from edge_llm.bundle.shipped import bundle_folder, shipped_bundle
from edge_llm.bundle.store import SELECTION_FILE, STARTS_FILE, BundleStore, Health, Selection
from edge_llm.config import Config, bundle_store_dir
from edge_llm.errors import BundleHealthError, BundleIntegrityError, BundleNotFoundError, ConfigError
from tests.bundle.versions import version_of


@pytest.fixture
def store(tmp_path):
    return BundleStore(tmp_path / "store")


@pytest.fixture
def two(store, tmp_path):
    """Digests of two installed bundles; the first is current."""
    digests = [install(store, version_of(tmp_path, version))[0].digest for version in ("1.0", "2.0")]
    store.activated(digests[0])
    return digests


def test_an_empty_store_has_nothing_and_makes_nothing(store):
    assert store.digests() == []
    assert store.selection() == Selection()
    assert not store.is_followed()
    assert not store.folder.exists()


def test_the_one_before_is_remembered(store, two):
    first, second = two
    store.activated(second)
    assert (store.selection().current, store.selection().previous) == (second, first)
    assert store.selection().health[second].ok
    # Once more changes nothing: there is still something to go back to.
    store.activated(second)
    assert (store.selection().current, store.selection().previous) == (second, first)
    store.activated(first)
    assert (store.selection().current, store.selection().previous) == (first, second)


def test_a_refused_one_changes_nothing_but_what_is_known_of_it(store, two):
    first, second = two
    wanted = store.want(second)
    assert store.selection().wanted == wanted
    store.refused(second, Health.failed(BundleHealthError("it is slow")))
    selection = store.selection()
    assert (selection.current, selection.previous, selection.wanted) == (first, None, None)
    assert (selection.health[second].kind, selection.health[second].detail) == ("health", "it is slow")


def test_a_bundle_is_found_by_name_version_and_hash(store, two):
    first, second = two
    assert store.find("tiny@2.0") == second
    assert store.find(first[:8]) == first
    with pytest.raises(BundleNotFoundError, match=r"may be .*: give more"):
        store.find("tiny")
    for name in ("other", ""):
        with pytest.raises(BundleNotFoundError, match="no bundle"):
            store.find(name)


def test_a_manifest_that_was_changed_since_is_refused(store, two):
    path = store.path(two[0]) / "manifest.json"
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(BundleIntegrityError, match="changed since it was installed"):
        store.open(two[0])


def test_all_but_the_current_one_can_be_removed(store, two):
    first, second = two
    store.activated(second)
    with pytest.raises(ConfigError, match="is the current bundle"):
        store.remove(second)
    store.remove(first)
    assert store.digests() == [second]
    assert (store.selection().current, store.selection().previous) == (second, None)
    assert first not in store.selection().health
    assert not list(store.folder.glob(".incoming-*"))


def test_the_one_that_is_wanted_is_not_removed(store, two):
    store.want(two[1])
    with pytest.raises(ConfigError):
        store.remove(two[1])


@pytest.mark.parametrize("content", [b"", b"{", b'{"format": 2}', b'{"current": "../.."}', b"\xff" * 100])
def test_a_damaged_selection_counts_as_none(store, two, content, caplog):
    (store.folder / SELECTION_FILE).write_bytes(content)
    assert store.selection() == Selection()
    assert "cannot be used" in caplog.text
    store.activated(two[1])
    assert store.selection().current == two[1]


def test_starts_without_ready_are_counted_and_change_nothing(store, two):
    store.activated(two[1])
    before = store.selection()
    assert [store.begin_start() for _ in range(4)] == [(before, count) for count in range(4)]
    store.set_starts(two[1], 1)
    assert store.begin_start() == (before, 1)
    store.set_starts(two[1], 0)
    assert store.begin_start() == (before, 0)


@pytest.mark.parametrize("to_shipped", [False, True])
def test_roll_back_changes_the_selection_only_if_what_failed_is_current(store, two, to_shipped):
    first, second = two
    store.activated(second)
    sick = Health.failed(BundleHealthError("no"))
    to = None if to_shipped else first
    assert store.roll_back({"c" * 64: sick}, to).current == second
    after = store.roll_back({second: sick}, to)
    assert (after.current, after.previous, after.health[second]) == (to, None, sick)
    assert store.selection() == after


def test_the_one_that_comes_along_can_be_current_and_before(store, two):
    store.activated(None)
    selection = store.selection()
    assert (selection.current, selection.previous) == (None, two[0])
    store.activated(two[1])
    assert store.selection().previous is None


def test_ready_starts_the_count_anew(store, two):
    store.activated(two[1])
    for _ in range(10):
        assert store.begin_start()[1] == 0
        store.end_start()
    for _ in range(2):
        store.begin_start()
    # As does another activation of the same bundle.
    store.activated(two[1])
    assert store.begin_start()[1] == 0


def test_a_damaged_count_begins_anew(store, two):
    store.activated(two[1])
    for _ in range(3):
        store.begin_start()
    (store.folder / STARTS_FILE).write_bytes(b"\0" * 20)
    assert store.begin_start()[1] == 0


def test_what_a_daemon_was_asked_for_when_it_ended_is_not_tried_again(store, two):
    store.want(two[1])
    selection, _ = store.begin_start()
    assert (selection.current, selection.wanted) == (two[0], None)
    assert selection.health[two[1]].kind == "interrupted"


def test_who_follows_is_seen_as_long_as_it_lives(store):
    import os

    descriptor = store.follow()
    assert store.is_followed()
    os.close(descriptor)
    assert not store.is_followed()


def test_what_is_served_without_a_name(store, two, tmp_path):
    config = Config(bundle_store=str(store.folder))
    assert bundle_store_dir(Config(state_dir="/var/lib/edge-llm")).parts[-2:] == ("edge-llm", "bundles")
    assert bundle_folder(config) == store.path(two[0])
    assert bundle_folder(Config(bundle="/b", bundle_store=str(store.folder))).name == "b"
    assert bundle_folder(Config(bundle_store=str(tmp_path / "none"))) == shipped_bundle()


def test_the_files_are_for_people_too(store, two):
    store.begin_start()
    assert json.loads((store.folder / SELECTION_FILE).read_text())["current"] == two[0]
    assert json.loads((store.folder / STARTS_FILE).read_text()) == {"digest": two[0], "count": 1}
    assert Bundle.open(store.path(two[0])).manifest.version == "1.0"


def test_a_long_reason_is_cut_so_that_the_selection_can_be_read_again(store, two):
    reason = "\x01" * (1 << 20)  # six bytes each in JSON
    store.refused(two[1], Health.failed(BundleHealthError(reason)))
    assert store.selection().health[two[1]].detail == reason[:2000]
