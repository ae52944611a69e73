"""Bundles that come from outside, as a folder or an archive: checked, copied, and then all of it there at once.

Signature and manifest come first, and after that only the files that the manifest names, each of exactly the size that
it says. Nothing is written before it is known to fit, and nothing is shown before every hash has been checked.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from edge_llm.bundle.archive import open_archive
from edge_llm.bundle.files import flush_to_disk, read_plain_file
from edge_llm.bundle.manifest import MANIFEST_FILE, MAX_MANIFEST_BYTES, Bundle
from edge_llm.bundle.signature import SIGNATURE_BYTES, SIGNATURE_FILE
from edge_llm.bundle.store import INCOMING_PREFIX, INSTALL_LOCK
from edge_llm.errors import BundleError, BundleNotFoundError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edge_llm.bundle.store import BundleStore

# Read before anything is known about the bundle, so bounded by these and not by the manifest.
HEAD_BYTES: Final = {MANIFEST_FILE: MAX_MANIFEST_BYTES, SIGNATURE_FILE: SIGNATURE_BYTES}
# What stays free on the disk: the daemon's own files, and the blocks that files end in.
_SPARE_BYTES: Final = 16 << 20
_COPY_BYTES: Final = 1 << 20


class Source(Protocol):
    """Where a bundle comes from."""

    def read_head(self) -> dict[str, bytes]:
        """The files of ``HEAD_BYTES`` that there are. Raises ``BundleError`` or ``OSError``."""

    def copy(self, sizes: Mapping[str, int], folder: Path) -> None:
        """Write files into ``folder``, where their own folders are; each must have just the size in bytes.

        Raises:
            BundleError: one is missing, of another size, or not a plain file.
            OSError: the disk is full, or the source cannot be read.
        """


class FolderSource:
    """A bundle folder, as the export writes it.

    Args:
        bundle: opened.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle

    def read_head(self) -> dict[str, bytes]:
        """Manifest, and signature if there is one."""
        head = {}
        for name, max_bytes in HEAD_BYTES.items():
            path = self._bundle.path / name
            if name == MANIFEST_FILE or path.is_symlink() or path.exists():
                head[name] = read_plain_file(path, max_bytes)
        return head

    def copy(self, sizes: Mapping[str, int], folder: Path) -> None:
        """Copy the files."""
        for name, size_bytes in sizes.items():
            path = self._bundle.verified_path(name)
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            with open(descriptor, "rb") as source, open(folder / name, "xb") as target:
                left = size_bytes
                while left and (block := source.read(min(left, _COPY_BYTES))):
                    target.write(block)
                    left -= len(block)


def install(store: BundleStore, source: Path, keys: Sequence[str | Path] = ()) -> tuple[Bundle, bool]:
    """Put a bundle into the store: all of it, or nothing.

    Args:
        store: where to; made if need be.
        source: a folder, or a .tar, .tar.gz or .zip of one.
        keys: public keys, one of which must have signed it; none is asked for if empty.

    Returns:
        The installed bundle, and whether it is new there.

    Raises:
        BundleError: it is not a bundle, not whole, not signed, or the archive is unsafe.
        ConfigError: it does not fit on the disk, or the store cannot be written.
    """
    if not source.is_dir() and not source.is_file():
        raise BundleNotFoundError(f"no bundle at {source}: give a bundle folder, or a .tar, .tar.gz or .zip of one")
    try:
        with store.locked(INSTALL_LOCK):
            store.clean()
            return _install(store, source, keys)
    except OSError as error:
        if isinstance(error, BundleError):
            raise
        raise ConfigError(f"the bundle cannot be installed in {store.folder}: {error}") from None


def _install(store: BundleStore, source: Path, keys: Sequence[str | Path]) -> tuple[Bundle, bool]:
    incoming = _new_folder(store)
    try:
        if source.is_dir():
            origin: Source = FolderSource(Bundle.open(source, keys))
            bundle, is_new = _take(store, origin, incoming, keys)
        else:
            with open_archive(source, HEAD_BYTES) as origin:
                bundle, is_new = _take(store, origin, incoming, keys)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)
    return bundle, is_new


def _take(store: BundleStore, source: Source, incoming: Path, keys: Sequence[str | Path]) -> tuple[Bundle, bool]:
    head = source.read_head()
    if MANIFEST_FILE not in head:
        raise BundleNotFoundError(f"there is no {MANIFEST_FILE} in it, so it is not a bundle")
    for name, content in head.items():
        with open(incoming / name, "xb") as stream:
            stream.write(content)
    # From here on by the copy: what lies outside may still be changed.
    bundle = Bundle.open(incoming, keys)
    if _is_whole(store, bundle.digest, keys):
        return store.open(bundle.digest, keys), False
    sizes = {entry.path: entry.size_bytes for entry in bundle.manifest.files}
    _check_space(incoming, sum(sizes.values()))
    folders = sorted({parent for name in sizes for parent in (incoming / name).parents if incoming in parent.parents})
    for folder in folders:
        folder.mkdir()
    source.copy(sizes, incoming)
    bundle.verify()
    for path in (*(incoming / name for name in (*head, *sizes)), *reversed(folders), incoming):
        flush_to_disk(path)
    _put(store, incoming, bundle.digest)
    return store.open(bundle.digest, keys), True


def _is_whole(store: BundleStore, digest: str, keys: Sequence[str | Path]) -> bool:
    """Whether the bundle is installed already, with every file as it should be."""
    if not store.path(digest).is_dir():
        return False
    try:
        store.open(digest, keys).verify()
    except BundleError:
        return False
    return True


def _put(store: BundleStore, incoming: Path, digest: str) -> None:
    target = store.path(digest)
    if target.exists():
        # It is damaged, or lacks its signature: of no use to anybody until it is replaced.
        target.rename(_new_folder(store) / "damaged")
    incoming.rename(target)
    flush_to_disk(store.folder)
    store.clean()


def _new_folder(store: BundleStore) -> Path:
    # A relative store has to stay so (bundle/owner.py); Python 3.12 returns an absolute path.
    return store.folder / Path(tempfile.mkdtemp(prefix=INCOMING_PREFIX, dir=store.folder)).name


def _check_space(folder: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes + _SPARE_BYTES > free_bytes:
        raise ConfigError(
            f"no space for the bundle in {folder.parent}: it needs {needed_bytes / 1e6:.0f} MB, "
            f"{free_bytes / 1e6:.0f} MB are free. `edge-llm bundle remove` makes room"
        )
