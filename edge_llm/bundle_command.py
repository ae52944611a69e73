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
from edge_llm.bundle.owner import as_owner, in_folder_as_owner
from edge_llm.bundle.prepare import prepared_dir, remove_copies
from edge_llm.bundle.shipped import open_bundle
from edge_llm.bundle.signature import SIGNATURE_FILE, check_signature
from edge_llm.bundle.store import ACTIVATE_LOCK, BundleStore, Health
from edge_llm.config import bundle_store_dir, cache_dir
from edge_llm.engine.probe import check_bundle
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

    def work(store: BundleStore, is_anothers: bool) -> Iterator[str]:
        with _alone(store):
            yield from _activate(store, config, store.find(name), is_anothers)

    yield from as_owner(config, work)


def roll_back(config: Config) -> Iterator[str]:
    """Activate the bundle that was current before; if that was none, the one that comes with edge_llm.

    Yields and raises as ``activate_bundle``.
    """
    config = _absolute(config)

    def work(store: BundleStore, is_anothers: bool) -> Iterator[str]:
        with _alone(store):
            yield from _activate(store, config, _before(store, config), is_anothers)

    yield from as_owner(config, work)


def remove_bundle(config: Config, name: str) -> str:
    """Delete an installed bundle that is not current; a line for people.

    Raises:
        ConfigError: it is the current one, or cannot be deleted.
        BundleNotFoundError: it is not there.
    """

    def work(store: BundleStore, _is_anothers: bool) -> Iterator[str]:
        with _alone(store):
            digest = store.find(name)
            try:
                store.remove(digest)
            except OSError as error:
                raise ConfigError(f"the bundle {digest[:12]} cannot be removed: {error}") from None
        yield digest

    (digest,) = as_owner(config, work)
    return f"removed {digest[:12]}{_remove_prepared(config, digest)}"


def _remove_prepared(config: Config, digest: str) -> str:
    """Delete the prepared copies of a bundle that is gone; what there is to say of it."""
    folder = prepared_dir(cache_dir(config)).absolute()

    def work(path: Path, _is_anothers: bool) -> Iterator[str]:
        try:
            if remove_copies(path, digest):
                yield ", and what was prepared of it"
        except OSError as error:
            raise ConfigError(f"{folder} cannot be changed: {error.strerror}") from None

    try:
        return "".join(in_folder_as_owner("the folder of prepared copies", folder, (folder.parent, folder), work))
    except ConfigError as error:
        return f", but not what was prepared of it: {error}"


def _activate(store: BundleStore, config: Config, digest: str | None, is_anothers: bool) -> Iterator[str]:
    """Serve a bundle from now on; None is the one that comes with edge_llm.

    Yields and raises as ``activate_bundle``.
    """
    bundle = open_bundle(store, digest, config.bundle_keys)
    title = _title(bundle) if digest is not None else f"{_title(bundle)}, which comes with edge_llm"
    if is_anothers and not store.is_followed():
        # Where the health prompt would be answered, the daemon's own limits and folders are not.
        raise ConfigError(
            f"no daemon runs, and only the daemon can try {title} as its own user: start it first "
            "(systemctl start edge-llm), then activate again. A start that fails goes back by itself"
        )
    if config.bundle is not None:
        yield f"note: the setting bundle = {config.bundle} names what is served; without it the store's current one is"
    try:
        if store.is_followed():
            yield f"asking the running daemon to switch to {title}; it serves on meanwhile"
            bundle.verify()
            _ask_daemon(store, config, digest)
        else:
            yield f"no daemon runs: trying {title} here"
            check_bundle(store, digest, config)
            store.activated(digest)
    except OSError as error:
        if isinstance(error, EdgeLlmError):
            raise _told(store, bundle, digest, error) from None
        raise ConfigError(f"the bundle store {bundle_store_dir(config)} cannot be written: {error}") from None
    except EdgeLlmError as error:
        raise _told(store, bundle, digest, error) from None
    yield f"current: {title}, which has answered its health prompt"


def _before(store: BundleStore, config: Config) -> str | None:
    """What was current before; None is the bundle that comes with edge_llm. Raises ``BundleNotFoundError``."""
    selection = store.selection()
    if selection.previous is None:
        what = "there is no previous bundle to roll back to"
        if selection.current is None:
            raise BundleNotFoundError(f"{what}: `edge-llm bundle list` shows them")
        try:
            open_bundle(store, None, config.bundle_keys)
        except BundleError as error:
            raise BundleNotFoundError(f"{what}, and none that comes with edge_llm: {error}") from None
    return selection.previous


@contextlib.contextmanager
def _alone(store: BundleStore) -> Iterator[None]:
    """Let no other command activate or remove a bundle meanwhile; not waited for, as that may take minutes.

    Raises:
        ConfigError: another one does just now, or the store cannot be written.
    """
    with contextlib.ExitStack() as held:
        try:
            # Where there is no store, nothing is installed.
            if store.folder.is_dir():
                held.enter_context(store.locked(ACTIVATE_LOCK, wait=False))
        except BlockingIOError:
            raise ConfigError(
                "another command is activating or removing a bundle here: try again when it has ended"
            ) from None
        except OSError as error:
            raise ConfigError(f"the bundle store {store.folder} cannot be written: {error}") from None
        yield


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
    # With the lock held: the daemon has then brought it to the disk, and announces it at once.
    selection = store.update(lambda selection: selection)
    health = None if digest is None else selection.health.get(digest)
    if health is not None and not health.ok:
        raise BundleError(health.detail)
    if selection.current != digest:
        why = (
            "another bundle was wanted meanwhile" if digest else "the daemon stays on the old bundle: its log says why"
        )
        raise BundleError(why)


def _told(store: BundleStore, bundle: Bundle, digest: str | None, error: EdgeLlmError) -> EdgeLlmError:
    """The same error, with what has become of it; the store remembers the reason of an installed one."""
    selection = store.selection()
    health = None if digest is None else selection.health.get(digest)
    if health is None or health.ok or health.detail != str(error):
        with contextlib.suppress(OSError):
            selection = store.update(lambda before: before.with_health(digest, Health.failed(error)))
    stays = "the one that comes with edge_llm" if selection.current is None else selection.current[:12]
    return BundleError(f"{bundle.digest[:12]} is not activated, the current bundle stays {stays}: {error}")


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
