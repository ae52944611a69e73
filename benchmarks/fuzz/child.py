"""One child process of a campaign: a line on stdout for each input, so that a crash or a hang has a number.

``python -m benchmarks.fuzz.child ENTRY SEED FIRST COUNT SECONDS [CASE]`` prints ``ready``, then ``ok OUTCOME`` or
``fault REASON`` for the inputs FIRST, FIRST + 1, … of the seed, or for the one in the file CASE.
"""

from __future__ import annotations

import importlib
import logging
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Final

from benchmarks.fuzz.subject import judge

if TYPE_CHECKING:
    from benchmarks.fuzz.subject import Outcome, Subject

MAX_MEMORY_BYTES: Final = 4 << 30


def open_subject(entry: str, folder: Path) -> Subject:
    """Make the subject that ``module:function`` names; the function is given a folder."""
    module, _, name = entry.partition(":")
    subject: Subject = getattr(importlib.import_module(module), name)(folder)
    return subject


def make_case(subject: Subject, seed: int, index: int) -> bytes:
    """The input of a number: always the same, whatever was tried before."""
    return subject.make(Random(f"{seed}:{index}"))


def run(entry: str, seed: int, first: int, count: int, seconds: float, case: Path | None) -> None:
    """Try ``count`` inputs, or what ``seconds`` allow."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)
    # What the code under test prints does not belong among the outcomes.
    out = os.dup(1)
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory(prefix="edge-llm-fuzz-") as name:
        subject = open_subject(entry, Path(name))
        os.write(out, b"ready\n")
        ends_at = time.monotonic() + seconds
        if case is not None:
            os.write(out, _line(judge(subject, case.read_bytes())))
            return
        for index in range(first, first + count):
            if time.monotonic() >= ends_at:
                return
            os.write(out, _line(judge(subject, make_case(subject, seed, index))))


def _line(outcome: Outcome) -> bytes:
    text = " ".join(outcome.what.split()).encode("utf-8", "backslashreplace")
    return (b"fault " if outcome.is_fault else b"ok ") + text + b"\n"


if __name__ == "__main__":
    _entry, _seed, _first, _count, _seconds, *_case = sys.argv[1:]
    run(_entry, int(_seed), int(_first), int(_count), float(_seconds), Path(_case[0]) if _case else None)
