"""Switching bundles, with nodes and bundles that only pretend: what is loaded, what stays, and what is recorded."""

from __future__ import annotations

import threading
import weakref
from types import SimpleNamespace

import pytest

from edge_llm import updating
from edge_llm.bundle.store import SELECTION_FILE, BundleStore
from edge_llm.config import Config
from edge_llm.errors import BundleHealthError, BundleIntegrityError, MemoryPlanError
from edge_llm.metrics import Metrics
from edge_llm.updating import Updater

OLD, NEW, OTHER = "a" * 64, "b" * 64, "c" * 64
WAIT_S = 30


def bundle(digest):
    return SimpleNamespace(digest=digest, path=digest, manifest=SimpleNamespace(name=digest[0]))


class FakeNode:
    """Notes what it is told to do, and what ``on_announce`` finds whenever something is announced.

    ``load_fails`` has the errors of the next loads, by digest.
    """

    def __init__(self):
        self.done = []
        self.update = None
        self.announced = []
        self.on_announce = lambda: None
        self.load_fails = {}
        self.gate = threading.Event()
        self.gate.set()
        self.served = SimpleNamespace(bundle=bundle(OLD), model=SimpleNamespace(copy_in_use=None))

    def load(self, what, *, beside=False):
        self.done.append(("load beside" if beside else "load", what.digest[0]))
        assert self.gate.wait(WAIT_S)
        if self.load_fails.get(what.digest):
            raise self.load_fails[what.digest].pop(0)
        return SimpleNamespace(bundle=what)

    def start(self, model):
        self.done.append(("start", model.bundle.digest[0]))
        before, self.served = self.served, SimpleNamespace(bundle=model.bundle, model=SimpleNamespace(copy_in_use=None))
        return before

    def announce(self, update=None):
        self.update = update or self.update
        self.announced.append(self.on_announce())

    def retire(self, served, _hurry):
        self.done.append(("retire", served.bundle.digest[0]))

    def pause(self, _next, hurry):
        self.retire(self.served, hurry)
        self.served = None

    def set_update(self, update):
        self.update = update


def tick_for_ever(world):
    while True:
        world.updater.tick()


class World:
    def __init__(self, tmp_path, monkeypatch, **settings):
        self.store = BundleStore(tmp_path / "store")
        for digest in (OLD, NEW, OTHER):
            self.store.path(digest).mkdir(parents=True)
        self.store.activated(OLD)
        monkeypatch.setattr(updating, "open_bundle", lambda _store, digest, _keys=(): bundle(digest or OTHER))
        self.node = FakeNode()
        self.metrics = Metrics()
        self.probe_fails = []
        self.probed = []
        config = Config(**settings)
        self.updater = Updater(self.store, config, self.node, self.metrics, threading.Event())
        monkeypatch.setattr(updating, "check_bundle", self.check)

    def check(self, _store, digest, _config):
        self.probed.append((digest or OTHER)[0])
        if self.probe_fails and (error := self.probe_fails.pop(0)) is not None:
            raise error
        return bundle(digest or OTHER)

    def settle(self, **options):
        """Tick until nothing goes on."""
        self.updater.tick(**options)
        while (attempt := self.updater._attempt) is not None:
            attempt.join(WAIT_S)
            self.updater.tick()

    def count(self, name):
        return self.metrics.counter(name)


@pytest.fixture
def world(tmp_path, monkeypatch):
    return World(tmp_path, monkeypatch)


def test_nothing_happens_as_long_as_nothing_is_wanted(world):
    world.settle()
    world.settle(again=True)
    assert world.node.done == []


def test_a_wanted_bundle_is_loaded_beside_the_old_one(world):
    world.store.want(NEW)
    world.settle()
    assert world.node.done == [("load beside", "b"), ("start", "b"), ("retire", "a")]
    selection = world.store.selection()
    assert (selection.current, selection.previous, selection.wanted) == (NEW, OLD, None)
    assert selection.health[NEW].ok
    assert world.node.update == {"digest": NEW, "ok": True}
    assert world.count("bundle_switches") == 1


def test_what_is_announced_is_recorded_already(world):
    def recorded():
        selection = world.store.selection()
        return selection.current, selection.wanted

    world.node.on_announce = recorded
    world.store.want(NEW)
    world.settle()
    # One after the other for want of memory: the first time it works, the second time the old one comes back.
    for reason in (None, BundleHealthError("it answers wrongly")):
        world.probe_fails = [MemoryPlanError("this needs 2 GB"), reason]
        world.store.want(OTHER if reason is None else OLD)
        world.settle()
    assert world.node.announced == [(NEW, None), (OTHER, None), (OTHER, None)]
    assert (world.node.update["digest"], world.node.update["kind"]) == (OLD, "health")
    assert world.count("bundle_refused_health") == 1


def test_what_another_process_has_made_current_is_followed(world):
    world.store.activated(NEW)
    world.settle()
    assert world.node.served.bundle.digest == NEW
    world.store.activated(OLD)
    world.settle()
    assert world.node.served.bundle.digest == OLD


def test_one_that_fails_its_prompt_is_not_loaded(world):
    world.probe_fails = [BundleHealthError("it answers wrongly")]
    world.store.want(NEW)
    world.settle()
    assert world.node.done == []
    selection = world.store.selection()
    assert (selection.current, selection.wanted) == (OLD, None)
    assert selection.health[NEW].detail == "it answers wrongly"
    assert world.node.update == {"digest": NEW, "ok": False, "kind": "health", "reason": "it answers wrongly"}
    assert world.count("bundle_refused_health") == 1


@pytest.mark.parametrize("fault", [RuntimeError("onnxruntime"), BundleIntegrityError("tampered"), OSError("disk")])
def test_whatever_goes_wrong_the_old_one_serves_on(world, fault):
    world.node.load_fails = {NEW: [fault]}
    world.store.want(NEW)
    world.settle()
    assert world.node.served.bundle.digest == OLD
    assert world.store.selection().health[NEW].detail == str(fault)


def test_without_memory_for_two_the_old_one_goes_first(world):
    world.probe_fails = [MemoryPlanError("this needs 2 GB")]
    world.store.want(NEW)
    world.settle()
    assert world.node.done == [("retire", "a"), ("load", "b"), ("start", "b")]
    assert world.store.selection().current == NEW
    # The second one may be too large only when all of it is loaded.
    world.node.load_fails = {OTHER: [MemoryPlanError("this needs 2 GB")]}
    world.store.want(OTHER)
    world.settle()
    assert world.node.done[3:] == [("load beside", "c"), ("retire", "b"), ("load", "c"), ("start", "c")]


def test_without_memory_for_two_a_bad_one_gives_way_to_the_old_one(world):
    world.probe_fails = [MemoryPlanError("this needs 2 GB"), BundleHealthError("it answers wrongly")]
    world.store.want(NEW)
    world.settle()
    assert world.node.done == [("retire", "a"), ("load", "a"), ("start", "a")]
    selection = world.store.selection()
    assert (selection.current, selection.previous, selection.wanted) == (OLD, None, None)
    assert selection.health[NEW].detail == "it answers wrongly"
    assert world.count("bundle_switches") == 0


def test_what_is_prepared_of_the_old_one_is_kept_until_it_is_decided(world):
    """The trial of the new one tidies away copies that nobody uses, and the old one may have to come back."""
    in_use = threading.Event()
    world.node.served.model.copy_in_use = in_use
    held, in_use = weakref.ref(in_use), None
    found = []
    load = world.node.load
    world.node.load = lambda what, **how: (found.append(held() is not None), load(what, **how))[1]
    world.probe_fails = [MemoryPlanError("this needs 2 GB"), BundleHealthError("it answers wrongly")]
    world.store.want(NEW)
    world.settle()
    assert found == [True]


def test_if_neither_can_be_loaded_the_daemon_ends(world):
    world.probe_fails = [MemoryPlanError("this needs 2 GB"), BundleHealthError("it answers wrongly")]
    world.node.load_fails = {OLD: [BundleIntegrityError("gone")]}
    world.store.want(NEW)
    with pytest.raises(BundleIntegrityError, match="gone"):
        world.settle()
    assert world.store.selection().current == OLD


def test_one_that_hangs_is_given_up(tmp_path, monkeypatch):
    world = World(tmp_path, monkeypatch, activation_timeout_s=0.01)
    world.node.gate.clear()
    world.store.want(NEW)
    world.updater.tick()
    attempt = world.updater._attempt
    while world.store.selection().wanted is not None:
        world.updater.tick()
    assert "activation_timeout_s" in world.store.selection().health[NEW].detail
    # It is in the way of every other, and what it brings in the end is not used.
    world.store.want(OTHER)
    world.updater.tick()
    assert "hangs" in world.store.selection().health[OTHER].detail
    world.node.gate.set()
    attempt.join(WAIT_S)
    world.settle()
    assert world.node.served.bundle.digest == OLD
    assert [what for what, _ in world.node.done] == ["load beside"]
    assert world.store.selection().current == OLD


def test_one_that_hangs_where_the_old_one_was_ends_the_daemon(tmp_path, monkeypatch):
    world = World(tmp_path, monkeypatch, activation_timeout_s=0.01)
    world.probe_fails = [MemoryPlanError("this needs 2 GB")]
    world.node.gate.clear()
    world.store.want(NEW)
    with pytest.raises(BundleHealthError):
        tick_for_ever(world)
    world.node.gate.set()
    # The next start serves the old one.
    assert world.store.selection().current == OLD


def test_a_stopping_daemon_does_not_switch_any_more(world):
    world.node.gate.clear()
    world.store.want(NEW)
    world.updater.tick()
    world.updater.close()
    world.node.gate.set()
    world.updater._attempt.join(WAIT_S)
    assert world.node.served.bundle.digest == OLD
    assert world.store.selection().current == OLD


def test_a_failed_one_is_tried_again_only_when_asked(world):
    world.probe_fails = [BundleHealthError("no"), BundleHealthError("no")]
    world.store.activated(NEW)
    world.settle()
    world.settle()
    assert world.probed == ["b"]
    world.settle(again=True)
    assert world.probed == ["b", "b"]
    world.settle(again=True)
    assert world.node.served.bundle.digest == NEW


def test_a_store_that_cannot_be_written_does_not_end_the_daemon(world, monkeypatch, caplog):
    world.store.want(NEW)

    def fail(*_):
        raise OSError("read-only")

    with monkeypatch.context() as disk:
        disk.setattr(BundleStore, "activated", fail)
        world.settle()
        world.settle()
        assert world.node.served.bundle.digest == NEW
        assert caplog.text.count("a restart will not know") == 1
        assert world.store.selection().current == OLD
    # As soon as there is room, the command that waits gets its answer.
    world.updater.tick()
    selection = world.store.selection()
    assert (selection.current, selection.wanted) == (NEW, None)


def test_a_refusal_that_cannot_be_written_is_written_later(world, monkeypatch):
    world.probe_fails = [BundleHealthError("it answers wrongly")]
    world.store.want(NEW)

    def fail(*_):
        raise OSError("read-only")

    with monkeypatch.context() as disk:
        disk.setattr(BundleStore, "refused", fail)
        world.settle()
    assert world.store.selection().wanted is not None
    world.updater.tick()
    assert world.store.selection().wanted is None
    assert world.store.selection().health[NEW].detail == "it answers wrongly"


@pytest.mark.parametrize("asked", [True, False])
def test_it_goes_back_to_the_bundle_that_comes_along(world, asked):
    # Asked by the command, or made so by another daemon that follows the store.
    if asked:
        world.store.want(None)
    else:
        world.store.activated(None)
    world.settle()
    world.settle()
    assert world.probed == ["c"]
    assert world.node.done == [("load beside", "c"), ("start", "c"), ("retire", "a")]
    selection = world.store.selection()
    assert (selection.current, selection.previous, selection.wanted) == (None, OLD, None)
    # And away from it again.
    world.store.want(NEW)
    world.settle()
    assert (world.store.selection().current, world.store.selection().previous) == (NEW, None)


def test_a_selection_that_is_lost_is_not_followed(world):
    world.settle()
    (world.store.folder / SELECTION_FILE).write_bytes(b"{")
    world.settle()
    assert world.node.done == []
