"""A state file, and a clock that stands until the test moves it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_llm.cache.state_db import StateDb, state_path


class Clock:
    now = 1.7e9

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def db(tmp_path: Path) -> Iterator[StateDb]:
    with contextlib.closing(StateDb.open(state_path(tmp_path))) as opened:
        yield opened
