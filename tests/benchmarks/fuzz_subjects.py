"""Subjects for the tests of campaigns: one input in ten fails, each in the way of its name."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

from edge_llm.errors import BundleError


class Subject:
    def __init__(self, fail: Callable[[], object]) -> None:
        self._fail = fail

    def make(self, rng: Random) -> bytes:
        return b"%d" % rng.randrange(1000)

    def take(self, case: bytes) -> str:
        number = int(case)
        if number % 10 == 3:
            self._fail()
        if number % 2:
            raise BundleError("refused")
        print("this is no outcome")
        return "taken"


def _raise(error: BaseException) -> None:
    raise error


def sound(_folder: Path) -> Subject:
    return Subject(lambda: None)


def faulty(_folder: Path) -> Subject:
    return Subject(lambda: _raise(ValueError("none\nof ours")))


def panicking(_folder: Path) -> Subject:
    return Subject(lambda: _raise(BaseException("as Rust does it")))


def greedy(_folder: Path) -> Subject:
    return Subject(lambda: bytearray(64 << 30))


def crashing(_folder: Path) -> Subject:
    return Subject(lambda: os.kill(os.getpid(), signal.SIGSEGV))


def hanging(_folder: Path) -> Subject:
    return Subject(lambda: time.sleep(600))


def unmakeable(_folder: Path) -> Subject:
    raise OSError("there is no sample")
