"""This process's memory, as Linux accounts it, and what the machine has left for it."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Final, NamedTuple

from edge_llm.device.sysfs import read_int, read_text
from edge_llm.errors import MemoryPlanError

_M_ARENA_MAX: Final = -8  # malloc.h


def rss_bytes() -> dict[str, int]:
    """Resident memory by kind: ``anon`` (the process's own) and ``file`` (mapped files, which can be dropped)."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {kind: int(fields[name].split()[0]) * 1024 for kind, name in (("anon", "RssAnon"), ("file", "RssFile"))}


def limit_malloc_arenas(count: int) -> None:
    """Let threads share ``count`` heaps (glibc): each heap of its own would keep what its largest prefill needed."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, count)


def trim_memory() -> None:
    """Hand freed memory back to the system, where the C library can (glibc).

    Parsing a tokenizer of 50,000 tokens leaves about 14 MB of it, loading a graph about 6 MB.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class Available(NamedTuple):
    """Memory that may still be used, and what bounds it."""

    nbytes: int
    source: str


def available_memory(root: Path = Path("/")) -> Available | None:
    """The smaller of what the machine and the process's control groups have left; None where nothing is told.

    Sources: ``MemAvailable`` of /proc/meminfo (proc(5)), ``memory.max`` and ``memory.current`` of cgroup v2,
    ``memory.limit_in_bytes`` and ``memory.usage_in_bytes`` of v1 (Documentation/admin-guide/cgroup-v2.rst, cgroup-v1).

    Args:
        root: the folder that holds ``proc`` and ``sys``.
    """
    bounds = []
    found = re.search(r"^MemAvailable:\s+(\d+) kB", read_text(root / "proc/meminfo") or "", re.MULTILINE)
    if found:
        bounds.append(Available(int(found[1]) * 1024, "MemAvailable"))
    for folder, limit_name, usage_name in _control_groups(root):
        limit = read_int(folder / limit_name)  # None where it says "max"
        usage = read_int(folder / usage_name)
        if limit is not None and usage is not None:
            left = limit - usage + _reclaimable(folder)
            bounds.append(Available(min(limit, max(0, left)), f"the limit of control group {folder.name}"))
    return min(bounds, default=None)


def check_memory(needs: dict[str, int], root: Path = Path("/")) -> None:
    """See that the machine can hold what is about to be loaded.

    Args:
        needs: bytes by what they are for.
        root: as for ``available_memory``.

    Raises:
        MemoryPlanError: with the sum.
    """
    available = available_memory(root)
    total = sum(needs.values())
    if available is None or total <= available.nbytes:
        return
    terms = " + ".join(f"{name} {_megabytes(nbytes)}" for name, nbytes in needs.items())
    raise MemoryPlanError(
        f"this needs {_megabytes(total)} MB of memory ({terms}), and {_megabytes(available.nbytes)} MB are left "
        f"({available.source}). Set fewer engine.slots, a smaller engine.context or cache.max_bytes, or free some"
    )


def _reclaimable(group: Path) -> int:
    """Bytes of files that nothing has read lately: counted as used, and given up before the limit bites."""
    stat = read_text(group / "memory.stat") or ""
    found = re.search(r"^total_inactive_file (\d+)$", stat, re.MULTILINE) or re.search(
        r"^inactive_file (\d+)$", stat, re.MULTILINE
    )
    return int(found[1]) if found else 0


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:.0f}"


def _control_groups(root: Path) -> list[tuple[Path, str, str]]:
    """Folders of the groups that this process is in, up to the uppermost, with the names of limit and usage."""
    groups: list[tuple[Path, str, str]] = []
    for line in (read_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            base, names = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", ".", "..")]
        groups += [(base.joinpath(*parts[:depth]), *names) for depth in range(len(parts), -1, -1)]
    return groups
