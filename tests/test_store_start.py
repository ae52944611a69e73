"""What a starting daemon serves, with nodes and bundles that only pretend: what is tried in turn, and what counts."""

from __future__ import annotations

import pytest

from edge_llm import daemon, store_start
from edge_llm.bundle.store import BundleStore
from edge_llm.config import Config
from edge_llm.errors import BundleIntegrityError, BundleNotFoundError, ConfigError, MemoryPlanError
from edge_llm.metrics import Metrics
from edge_llm.store_start import StoreStart
from tests.test_updating import NEW, OLD, OTHER, FakeNode, bundle


@pytest.fixture
def start(tmp_path, monkeypatch):
    store = BundleStore(tmp_path / "store")
    for digest in (OLD, NEW):
        store.path(digest).mkdir(parents=True)
        store.activated(digest)

    def open_one(_store, digest, _keys):
        if digest is None and not start.shipped:
            raise BundleNotFoundError("no bundle comes along")
        return bundle(digest or OTHER)

    def start(*, shipped=False):
        monkeypatch.setattr(store_start, "open_bundle", open_one)
        start.shipped = shipped
        return StoreStart(store, Config(), Metrics())

    start.store = store
    return start


def test_a_start_serves_the_current_one(start):
    assert start().bundle().digest == NEW
    assert start.store.is_followed()


def test_after_three_starts_without_ready_the_one_before_is_served(start):
    for _ in range(3):
        assert start().bundle().digest == NEW
    fourth = start()
    assert fourth.bundle().digest == OLD
    assert fourth.update == {
        "digest": NEW,
        "ok": False,
        "kind": "crash_loop",
        "reason": "3 starts without getting ready",
    }


def test_ready_ends_the_count(start):
    for _ in range(6):
        beginning = start()
        assert beginning.bundle().digest == NEW
        beginning.ready()


def test_one_that_cannot_be_loaded_gives_way_at_once_and_is_given_up_once_the_other_serves(start):
    before = start.store.selection()
    beginning = start()
    beginning.bundle()
    beginning.give_up(BundleIntegrityError("tampered"))
    assert beginning.bundle().digest == OLD
    assert start.store.selection() == before
    assert beginning.update["reason"] == "tampered"
    beginning.ready()
    after = start.store.selection()
    assert (after.current, after.previous, after.health[NEW].kind) == (OLD, None, "integrity")


def test_if_all_fail_the_selection_stays_and_the_start_does_not_count(start):
    before = start.store.selection()
    for _ in range(4):
        beginning = start(shipped=True)
        for digest in (NEW, OLD):
            assert beginning.bundle().digest == digest
            beginning.give_up(BundleIntegrityError("no such provider"))
        assert beginning.bundle().digest == OTHER
        with pytest.raises(BundleIntegrityError, match="no such provider"):
            beginning.give_up(BundleIntegrityError("no such provider"))
    assert start.store.selection() == before
    assert start().bundle().digest == NEW


def test_the_last_resort_is_the_one_that_comes_along(start):
    beginning = start(shipped=True)
    beginning.give_up(BundleIntegrityError("tampered"))
    beginning.give_up(BundleIntegrityError("tampered, too"))
    assert beginning.bundle().digest == OTHER
    assert start.store.selection().current == NEW
    beginning.ready()
    selection = start.store.selection()
    assert (selection.current, selection.previous) == (None, None)
    assert {selection.health[digest].kind for digest in (OLD, NEW)} == {"integrity"}


def test_each_has_three_starts_and_then_it_is_the_first_ones_turn_again(start):
    before = start.store.selection()
    served = [start(shipped=True).bundle().digest for _ in range(10)]
    assert served == [NEW] * 3 + [OLD] * 3 + [OTHER] * 3 + [NEW]
    assert start.store.selection() == before


def test_one_before_that_is_gone_is_nothing_to_go_back_to(start):
    start.store.path(OLD).rmdir()
    assert {start().bundle().digest for _ in range(5)} == {NEW}


def test_starts_that_are_not_the_bundles_fault_do_not_count(start):
    start()
    for _ in range(5):
        beginning = start()
        assert beginning.bundle().digest == NEW
        beginning.uncount()
    # What counted before still counts.
    start()
    start()
    assert start().bundle().digest == OLD


@pytest.mark.parametrize(("age_s", "status", "counted"), [(5.0, 0, 0), (90.0, 1, 1)])
def test_a_stop_while_loading_counts_only_if_it_comes_late(start, age_s, status, counted):
    assert daemon._stopped_while_loading(start(), age_s) == status
    assert start.store.begin_start()[1] == counted


@pytest.mark.parametrize("fault", [ConfigError("a wrong setting"), MemoryPlanError("this needs 2 GB")])
def test_a_wrong_setting_is_no_failed_start(start, fault):
    beginning = start()
    node = FakeNode()
    node.load_fails = {NEW: [fault]}
    with pytest.raises(type(fault)):
        daemon._start_first(node, beginning, beginning.bundle())
    assert start.store.begin_start()[1] == 0


def test_a_store_that_cannot_be_written_is_served_from_all_the_same(start, monkeypatch, caplog):
    def fail(*_):
        raise OSError("read-only")

    monkeypatch.setattr(BundleStore, "begin_start", fail)
    assert start().bundle().digest == NEW
    assert "starts are not counted" in caplog.text


def test_what_is_announced_is_recorded_already(start):
    node = FakeNode()
    node.load_fails = {NEW: [BundleIntegrityError("tampered")]}
    node.on_announce = lambda: start.store.selection().current
    beginning = start()
    daemon._start_first(node, beginning, beginning.bundle())
    assert node.announced == [OLD]
    assert (node.served.bundle.digest, node.update["reason"]) == (OLD, "tampered")
