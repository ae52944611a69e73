"""What Linux says about a process and about the machine: processor time and memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Memory:
    """Resident memory in decimal megabytes: the process's own, and mapped files, which can be dropped."""

    rss_anon_mb: float
    rss_file_mb: float


def memory(pid: int) -> Memory:
    """Resident memory of a process. Raises ``OSError`` if it is gone."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    anon, file = (int(fields[name].split()[0]) * 1024 / 1e6 for name in ("RssAnon", "RssFile"))
    return Memory(round(anon, 1), round(file, 1))


def cpu_seconds(pid: int) -> float:
    """User and system seconds of all threads of a process, in steps of 0.01. Raises ``OSError`` if it is gone."""
    # The name in parentheses may hold blanks; utime and stime are fields 14 and 15 (proc_pid_stat(5)).
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def machine_busy_seconds() -> float:
    """Processor time of everything on the machine, and what a hypervisor took from it, summed over the cores."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = (
        int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / _TICKS_PER_S
