"""The bundle folder: staged beside its destination, flushed, renamed; all of it or nothing."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import re
import shutil
from typing import TYPE_CHECKING

from edge_llm.bundle.files import flush_to_disk
from edge_llm.bundle.manifest import MANIFEST_FILE, FileEntry, encode_manifest, sha256_file
from export.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from edge_llm.bundle.files import flush_to_disk
from edge_llm.bundle.manifest import Manifest


def check_destination(out: Path) -> None:
    """Raises ``ExportError`` unless a bundle can be written to ``out``: nothing there, or an empty folder."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ExportError(f"{out} is not a folder: give --out another path")
    if out.is_dir() and any(out.iterdir()):
        raise ExportError(f"the output folder {out} is not empty: give --out a new path, or remove it first")
    parent = out.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ExportError(f"cannot write into {parent}: give --out another path")


def check_space(folder: Path, needed_bytes: int) -> None:
    """Raises ``ExportError`` if the file system of ``folder`` has less free space than is needed."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise ExportError(
            f"no space: the export needs {needed_bytes / 1e6:.0f} MB beside the output folder, "
            f"{free_bytes / 1e6:.0f} MB are free: free some, or give --out another disk"
        )


@contextlib.contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A temporary folder beside ``out``, on the same file system; removed on the way out, whatever happens.

    Raises:
        ExportError: the disk is full or the folder cannot be written.
    """
    created = [folder for folder in (out.parent, *out.parent.parents) if not folder.exists()]
    folder = out.parent / f".{out.name}.{os.getpid()}.partial"
    done = False
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(out)
        folder.mkdir()
        yield folder
        done = True
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ExportError(
                f"no space left on the disk of {out.parent}: free some, or give --out another disk"
            ) from None
        raise ExportError(f"cannot write {error.filename or out}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if not done:
            for parent in created:
                with contextlib.suppress(OSError):
                    parent.rmdir()


def list_files(folder: Path, paths: list[str]) -> tuple[FileEntry, ...]:
    """Manifest entries, with size and SHA-256, of files given relative to the bundle folder."""
    return tuple(
        FileEntry(path=path, size_bytes=(folder / path).stat().st_size, sha256=sha256_file(folder / path))
        for path in paths
    )


def publish(folder: Path, out: Path, manifest: Manifest) -> None:
    """Write the manifest, flush everything to the disk and rename the staged folder to ``out``.

    Raises:
        ExportError: something came to be at ``out`` in the meantime.
    """
    (folder / MANIFEST_FILE).write_bytes(encode_manifest(manifest))
    for path in [*folder.rglob("*"), folder]:
        flush_to_disk(path)
    try:
        os.rename(folder, out)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise ExportError(f"something else was written to {out} during the export: give --out a new path") from None
        raise
    flush_to_disk(out.parent)


def _remove_stale(out: Path) -> None:
    """Remove what an export to the same place left behind when it was killed."""
    for folder in out.parent.glob(f".{glob.escape(out.name)}.*.partial"):
        found = re.fullmatch(re.escape(f".{out.name}.") + r"(\d+)\.partial", folder.name)
        if found and not _is_running(int(found.group(1))):
            shutil.rmtree(folder, ignore_errors=True)


def _is_running(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
