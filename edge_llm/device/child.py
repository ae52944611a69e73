"""What every process that edge_llm starts of itself has in common."""

from __future__ import annotations

import contextlib
import signal
import sys
from pathlib import Path
from typing import Final

# `python -m` imports from the folder it is started in first, and under sudo anybody may own that. Root owns this one.
CHILD_FOLDER: Final = "/"


def child_command(module: str) -> list[str]:
    """How one of our modules is run; with ``cwd=CHILD_FOLDER``, so its arguments have to be absolute paths."""
    return [sys.executable, "-m", module]


def end_first_without_memory() -> None:
    """Should memory run out, the kernel is to end this process, not the daemon that may be serving (proc(5))."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def how_it_ended(status: int) -> str:
    """The signal, or the exit status, that a process ended with; as ``subprocess`` gives it."""
    return signal_name(-status) if status < 0 else f"exit status {status}"


def signal_name(number: int) -> str:
    """``SIGSEGV``, or ``signal 40`` for one without a name, as a real-time signal."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
