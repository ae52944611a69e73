"""Files that must survive a power cut, and files that somebody else has written."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from edge_llm.errors import BundleIntegrityError

if TYPE_CHECKING:
    from pathlib import Path


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk. Raises ``OSError``."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, content: bytes) -> None:
    """Put a file in place of the one before: after a power cut there is one or the other. Raises ``OSError``."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    flush_to_disk(path.parent)


def read_plain_file(path: Path, max_bytes: int) -> bytes:
    """The whole of a small file, if it is one: a pipe would block for ever, and a link may lead anywhere.

    Raises:
        BundleIntegrityError: it is a link or no plain file, or has more than ``max_bytes``.
        OSError: it is missing or cannot be read.
    """
    check_plain_file(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as stream:
        raw = stream.read(max_bytes + 1)
    if len(raw) > max_bytes:
        raise BundleIntegrityError(f"{path} is larger than {max_bytes} bytes")
    return raw


def check_plain_file(path: Path) -> int:
    """Size of a file in bytes. Raises ``BundleIntegrityError`` if it is a link or no plain file, else ``OSError``."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        what = "a link" if stat.S_ISLNK(status.st_mode) else "no plain file"
        raise BundleIntegrityError(f"{path} is {what}; a bundle holds plain files only")
    return status.st_size
