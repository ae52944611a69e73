"""The bundle store, killed at every step of every write: the old bundle or the new one, whole; never neither."""

from __future__ import annotations

from pathlib import Path

from edge_llm.bundle.incoming import install
from edge_llm.bundle.manifest import Bundle
from edge_llm.bundle.store import BundleStore
from tests.faults.test_power_cut import cut
from tests.paths import TINY_BUNDLE

OLD, NEW = "a" * 64, "b" * 64
DIGEST = Bundle.open(TINY_BUNDLE).digest


def stores(folder: Path, steps: int) -> list[BundleStore]:
    return [BundleStore(folder / str(step) / "store") for step in range(1, steps + 1)]


def test_an_installed_bundle_is_whole_or_not_there(tmp_path):
    steps = cut("install", tmp_path)
    assert steps >= 30
    seen = []
    for store in stores(tmp_path, steps):
        seen.append(store.digests())
        for digest in store.digests():
            store.open(digest).verify()
    assert seen == sorted(seen)
    assert seen[0] == []
    assert seen[-1] == [DIGEST]
    # What a cut leaves behind is in nobody's way, and goes with the next installation.
    for store in stores(tmp_path, steps)[:: max(1, steps // 6)]:
        install(store, TINY_BUNDLE)[0].verify()
        assert not list(store.folder.glob(".incoming-*"))


def test_the_current_bundle_is_the_old_or_the_new_one(tmp_path):
    steps = cut("activate", tmp_path)
    assert steps >= 15
    seen = []
    for store in stores(tmp_path, steps):
        selection = store.selection()
        assert (selection.current, selection.previous) in ((OLD, None), (NEW, OLD))
        seen.append(selection.current)
        # A start afterwards serves just that.
        assert store.begin_start()[0].current == selection.current
    assert seen == sorted(seen)
    assert set(seen) == {OLD, NEW}


def test_a_roll_back_ends_at_the_one_before(tmp_path):
    steps = cut("roll_back", tmp_path)
    assert steps >= 8
    seen = []
    for store in stores(tmp_path, steps):
        seen.append(store.selection().current)
        selection, count = store.begin_start()
        # The old one has its turn: it is current, or the count of the new one says so.
        assert selection.current == OLD or count >= 3
    assert set(seen) == {OLD, NEW}


def test_a_removed_bundle_is_whole_or_not_shown(tmp_path):
    steps = cut("remove", tmp_path)
    seen = []
    for store in stores(tmp_path, steps):
        assert store.selection().current == NEW
        seen.append(store.digests())
        for digest in store.digests():
            store.open(digest).verify()
    assert seen[0] == [DIGEST]
    assert seen[-1] == []
