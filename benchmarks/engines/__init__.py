"""This runtime and its peers behind one function each, so that one loop can measure them all.

An engine's module is imported in a worker process of its own (benchmarks/worker.py) and has ``load(path, threads,
context)``, which returns an ``EngineUnderTest``. Its imports are those of the peer's package: nothing else needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

OnToken = Callable[[int], None]


class EngineUnderTest(Protocol):
    """A loaded model."""

    version: str

    def generate(self, prompt_ids: Sequence[int], count: int, on_token: OnToken) -> None:
        """Generate ``count`` tokens greedily after a prompt of its own, whatever tokens they are.

        ``on_token`` is called as soon as each token is known: the first call ends the prefill, the others a decode
        step each.
        """
        ...


class LoadEngine(Protocol):
    """The ``load`` function of an engine's module."""

    def __call__(self, path: Path, threads: int, context: int) -> EngineUnderTest:
        """Load the model file or folder. Imports are done before, so this is what ``load_s`` times."""
        ...
