"""Which bundle counts as older than what has been served; the commands are in tests/test_bundle_command.py."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from edge_llm.bundle import shipped
from edge_llm.bundle.downgrade import refuse_downgrade, version_key
from edge_llm.bundle.incoming import install
from edge_llm.bundle.manifest import Bundle
from edge_llm.bundle.store import BundleStore, Health
from edge_llm.errors import BundleDowngradeError, BundleHealthError
from tests.bundle.versions import version_of
from tests.paths import TINY_BUNDLE


@pytest.fixture
def store(tmp_path):
    return BundleStore(tmp_path / "store")


@pytest.fixture
def put(store, tmp_path):
    """Installs a version; returns its digest."""
    return lambda version: install(store, version_of(tmp_path, version))[0].digest


def may(store, digest):
    manifest = shipped.open_bundle(store, digest).manifest
    try:
        refuse_downgrade(store, digest, manifest)
    except BundleDowngradeError:
        return False
    return True


def test_versions_are_compared_by_their_numbers():
    ordered = ["", "0.9", "1", "1.0.1", "1.2", "1.10", "v1.10.3", "2.0-rc1", "10"]
    for lower, higher in itertools.pairwise(ordered):
        assert version_key(lower) < version_key(higher)
    assert version_key("1") == version_key("v1.0.0")
    # A release must be able to follow its candidates, and the hash of a commit says nothing.
    assert version_key("2.0") == version_key("2.0-rc1")
    assert version_key("1.0-g3a4b") == version_key("1.0+abc123") == version_key("1.0")


def test_what_has_only_been_installed_does_not_count(store, put):
    first, second, newest = (put(version) for version in ("1.0", "2.0", "3.0"))
    store.activated(second)
    assert not may(store, first)
    assert may(store, newest)
    assert may(store, second)
    store.refused(newest, Health.failed(BundleHealthError("it answers wrongly")))
    assert not may(store, first)


def test_one_that_was_removed_does_not_count_any_more(store, put):
    old, newer, other = (put(version) for version in ("1.0", "3.0", "2.0"))
    for digest in (newer, other):
        store.activated(digest)
    assert may(store, newer)
    store.remove(newer)
    assert not may(store, old)
    store.activated(old)
    store.remove(other)
    assert may(store, put("1.5"))


def test_bundles_of_another_name_are_no_matter(store, put):
    store.activated(put("2.0"))
    manifest = msgspec.structs.replace(Bundle.open(TINY_BUNDLE).manifest, name="another", version="1.0")
    refuse_downgrade(store, "0" * 64, manifest)


def test_the_one_that_comes_along_counts_while_it_serves(store, put, monkeypatch):
    monkeypatch.setattr(shipped, "shipped_bundle", lambda: TINY_BUNDLE)
    old = put("0.0.1")
    assert not may(store, old)
    # But for going back to it, there is nothing to compare with while another one serves.
    store.activated(put("5.0"))
    assert may(store, None)
