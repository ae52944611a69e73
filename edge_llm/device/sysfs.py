"""Reading the kernel's small files: drivers refuse a read with many an error, and devices vanish."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

_MAX_BYTES: Final = 4096


def read_text(path: Path) -> str | None:
    """The beginning of a file, at most 4 KiB of it, or None if it cannot be read as ASCII."""
    try:
        with path.open("rb") as stream:
            return stream.read(_MAX_BYTES).decode("ascii")
    except (OSError, ValueError):
        return None


def read_line(path: Path) -> str | None:
    """The first line of a file without white space around it, or None."""
    text = read_text(path)
    return None if text is None else text.strip().split("\n", 1)[0].strip()


def read_int(path: Path) -> int | None:
    """A file that holds one whole number, or None."""
    try:
        return int(read_line(path) or "")
    except ValueError:
        return None


def folders(parent: Path, pattern: str) -> list[Path]:
    """What matches in a folder, sorted; nothing if it cannot be listed."""
    try:
        return sorted(parent.glob(pattern))
    except OSError:
        return []
