"""``edge-llm bundle install|list|activate|rollback|remove``: the bundles of a device, side by side.

Under sudo everything that changes the store is done as its owner, who is the daemon's user (bundle/owner.py).
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from edge_llm.bundle.files import read_plain_file
from edge_llm.bundle.incoming import install
from edge_llm.bundle.manifest import MANIFEST_FILE, MAX_MANIFEST_BYTES, Bundle
from edge_llm.bundle.owner import as_owner
from edge_llm.bundle.shipped import shipped_bundle
from edge_llm.bundle.signature import SIGNATURE_FILE, check_signature
from edge_llm.bundle.store import BundleStore, Health
from edge_llm.config import bundle_store_dir
from edge_llm.engine.probe import check_installed, probe
from edge_llm.errors import BundleError, BundleNotFoundError, BundleSignatureError, ConfigError, EdgeLlmError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edge_llm.bundle.store import Selection
    from edge_llm.config import Config

_POLL_S: Final = 0.2


@dataclass(frozen=True)
class Listed:
    """One installed bundle.

    Attributes:
        signed_by: the file of the trusted key; ``unknown`` if the signature is of none or no key is trusted here.
        trouble: why its manifest cannot be used, if it cannot; the names are empty then.
    """

    name: str
    version: str
    digest: str
    size_bytes: int
    signed_by: str | None
    current: bool
    previous: bool
    health: Health | None
    trouble: str | None = None


def install_bundle(config: Config, source: Path) -> tuple[str, str]:
    """Install, without activating; the digest, and what to tell people.

    Raises:
        BundleError: it is not a bundle that may be used here.
        ConfigError: it does not fit, or cannot be read by the store's owner.
    """
    config, source = _absolute(config), source.absolute()

    def work(store: BundleStore, _is_anothers: bool) -> Iterator[str]:
        try:
            bundle, is_new = install(store, source, config.bundle_keys)
        except PermissionError as error:
            raise ConfigError(f"the owner of the bundle store cannot read {source}: {error.strerror}") from None
        yield bundle.digest
        what = f"{_title(bundle)}, {_megabytes(bundle)} MB, every hash matches"
        signed = ", signed by a trusted key" if config.bundle_keys else ""
        where = "installed" if is_new else "was installed already"
        yield f"{where}: {what}{signed}\nto serve it: edge-llm bundle activate {bundle.digest[:12]}"

    digest, said = as_owner(config, work)
    return digest, said


def list_bundles(config: Config) -> list[Listed]:
    """Every installed bundle, the current one first.

    Raises:
        ConfigError: the store cannot be read, or a key cannot be used.
    """
    store = _store(config)
    selection = store.selection()
    listed = [_listed(store, digest, selection, config) for digest in store.digests()]
    return sorted(listed, key=lambda one: (not one.current, not one.previous, one.name, one.version, one.digest))


def format_list(listed: list[Listed], config: Config) -> str:
    """A table for people."""
    if not listed:
        return f"no bundles in {bundle_store_dir(config)}: the one that comes with edge_llm is served"
    rows = [("", "name", "version", "hash", "MB", "signed by", "last health")]
    for one in listed:
        mark = "current" if one.current else "previous" if one.previous else ""
        health = "not tried" if one.health is None else f"{one.health.at}: {one.health.detail}"
        rows.append(
            (
                mark,
                one.name,
                one.version,
                one.digest[:12],
                f"{one.size_bytes / 1e6:.1f}",
                one.signed_by or "nobody",
                one.trouble or health,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in rows
    )


def activate_bundle(config: Config, name: str) -> Iterator[str]:
    """Serve an installed bundle from now on, if it answers its health prompt; yields what is being done.

    Args:
        config: the settings of the daemon.
        name: its name, NAME@VERSION, or the beginning of its hash.

    Raises:
        BundleError: it is not there, or it fails: what was current before stays so.
        ConfigError: the store cannot be used.
    """
    config = _absolute(config)
    yield from as_owner(config, lambda store, is_anothers: _activate(store, config, store.find(name), is_anothers))


def roll_back(config: Config) -> Iterator[str]:
    """Activate the bundle that was current before; if that was none, the one that comes with edge_llm.

    Yields and raises as ``activate_bundle``.
    """
    config = _absolute(config)

    def work(store: BundleStore, is_anothers: bool) -> Iterator[str]:
        selection = store.selection()
        if selection.previous is not None:
            yield from _activate(store, config, selection.previous, is_anothers)
        elif selection.current is not None:
            yield from _activate_shipped(store, config, is_anothers)
        else:
            raise BundleNotFoundError("there is no previous bundle to roll back to: `edge-llm bundle list` shows them")

    yield from as_owner(config, work)


def remove_bundle(config: Config, name: str) -> str:
    """Delete an installed bundle that is not current; a line for people.

    Raises:
        ConfigError: it is the current one, or cannot be deleted.
        BundleNotFoundError: it is not there.
    """

    def work(store: BundleStore, _is_anothers: bool) -> Iterator[str]:
        digest = store.find(name)
        try:
            store.remove(digest)
        except OSError as error:
            raise ConfigError(f"the bundle {digest[:12]} cannot be removed: {error}") from None
        yield f"removed {digest[:12]}"

    (said,) = as_owner(config, work)
    return said


def _activate(store: BundleStore, config: Config, digest: str, is_anothers: bool) -> Iterator[str]:
    bundle = store.open(digest, config.bundle_keys)
    if is_anothers and not store.is_followed():
        # Where the health prompt would be answered, the daemon's own limits and folders are not.
        raise ConfigError(
            f"no daemon runs, and only the daemon can try {_title(bundle)} as its own user: start it first "
            "(systemctl start edge-llm), then activate again. A start that fails goes back by itself"
        )
    if config.bundle is not None:
        yield f"note: the setting bundle = {config.bundle} names what is served; without it the store's current one is"
    try:
        if store.is_followed():
            yield f"asking the running daemon to switch to {_title(bundle)}; it serves on meanwhile"
            bundle.verify()
            _ask_daemon(store, config, digest)
        else:
            yield f"no daemon runs: trying {_title(bundle)} here"
            check_installed(store, digest, config)
            store.activated(digest)
    except OSError as error:
        if isinstance(error, EdgeLlmError):
            raise _told(store, digest, error) from None
        raise ConfigError(f"the bundle store {bundle_store_dir(config)} cannot be written: {error}") from None
    except EdgeLlmError as error:
        raise _told(store, digest, error) from None
    yield f"current: {_title(bundle)}, which has answered its health prompt"


def _activate_shipped(store: BundleStore, config: Config, is_anothers: bool) -> Iterator[str]:
    """Serve the bundle that comes with edge_llm from now on. Yields and raises as ``activate_bundle``."""
    try:
        bundle = Bundle.open(shipped_bundle(), config.bundle_keys)
    except BundleError as error:
        raise BundleNotFoundError(
            f"there is no previous bundle to roll back to, and none that comes with edge_llm: {error}"
        ) from None
    is_followed = store.is_followed()
    if is_anothers and not is_followed:
        raise ConfigError("no daemon runs, and only the daemon can try a bundle as its own user: start it first")
    try:
        if is_followed:
            yield f"asking the running daemon to switch to {_title(bundle)}, which comes with edge_llm"
            _ask_daemon(store, config, None)
        else:
            yield f"no daemon runs: trying {_title(bundle)}, which comes with edge_llm, here"
            bundle.verify()
            probe(bundle.path, config)
            store.activated(None)
    except OSError as error:
        if isinstance(error, EdgeLlmError):
            raise
        raise ConfigError(f"the bundle store {bundle_store_dir(config)} cannot be written: {error}") from None
    yield f"current: {_title(bundle)}, which has answered its health prompt"


def _ask_daemon(store: BundleStore, config: Config, digest: str | None) -> None:
    """Have the daemon switch, and wait for the end of it; None is the bundle that comes with edge_llm.

    Raises:
        BundleError: it stays on the old one, or does not say in time what has become of it.
        OSError: the store cannot be written.
    """
    wanted = store.want(digest)
    limit_s = 2 * config.activation_timeout_s + config.serving.drain_timeout_s
    give_up_at = time.monotonic() + limit_s
    while store.selection().wanted == wanted:
        if not store.is_followed():
            raise BundleError("the daemon has ended while it was switching; what it serves next, the list shows")
        if time.monotonic() > give_up_at:
            raise BundleError(
                f"the daemon has not recorded within {limit_s:g} s what has become of it, and may still switch: "
                "see its log, and whether the disk is full"
            )
        time.sleep(_POLL_S)
    selection = store.selection()
    health = None if digest is None else selection.health.get(digest)
    if health is not None and not health.ok:
        raise BundleError(health.detail)
    if selection.current != digest:
        why = (
            "another bundle was wanted meanwhile" if digest else "the daemon stays on the old bundle: its log says why"
        )
        raise BundleError(why)


def _told(store: BundleStore, digest: str, error: EdgeLlmError) -> EdgeLlmError:
    """The same error, with what has become of it; the store remembers the reason."""
    selection = store.selection()
    health = selection.health.get(digest)
    if health is None or health.ok or health.detail != str(error):
        with contextlib.suppress(OSError):
            selection = store.update(lambda before: before.with_health(digest, Health.failed(error)))
    stays = "the one that comes with edge_llm" if selection.current is None else selection.current[:12]
    return BundleError(f"{digest[:12]} is not activated, the current bundle stays {stays}: {error}")


def _listed(store: BundleStore, digest: str, selection: Selection, config: Config) -> Listed:
    is_current, is_previous = selection.current == digest, selection.previous == digest
    health = selection.health.get(digest)
    try:
        bundle = store.open(digest)
        signed_by = _signed_by(bundle, config)
    except BundleError as error:
        return Listed("", "", digest, 0, None, is_current, is_previous, health, str(error))
    manifest = bundle.manifest
    size_bytes = sum(entry.size_bytes for entry in manifest.files)
    return Listed(manifest.name, manifest.version, digest, size_bytes, signed_by, is_current, is_previous, health)


def _signed_by(bundle: Bundle, config: Config) -> str | None:
    if not (bundle.path / SIGNATURE_FILE).exists():
        return None
    if not config.bundle_keys:
        return "unknown"
    try:
        raw = read_plain_file(bundle.path / MANIFEST_FILE, MAX_MANIFEST_BYTES)
        return check_signature(bundle.path, raw, config.bundle_keys).name
    except (BundleSignatureError, OSError):
        return "unknown"


def _store(config: Config) -> BundleStore:
    return BundleStore(bundle_store_dir(config))


def _absolute(config: Config) -> Config:
    """The same settings, for a process in another folder."""
    return msgspec.structs.replace(config, bundle_keys=tuple(os.path.abspath(key) for key in config.bundle_keys))


def _title(bundle: Bundle) -> str:
    return f"{bundle.manifest.name} {bundle.manifest.version} ({bundle.digest[:12]})"


def _megabytes(bundle: Bundle) -> str:
    return f"{sum(entry.size_bytes for entry in bundle.manifest.files) / 1e6:.1f}"
