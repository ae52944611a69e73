"""What a campaign runs against, and how one input is judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from edge_llm.errors import EdgeLlmError, RequestError

if TYPE_CHECKING:
    from random import Random


class BrokenPromiseError(Exception):
    """An input was taken, but what came of it is not what the code promises."""


class Subject(Protocol):
    """One kind of input and the code that reads it; made once in a child process, in an empty folder of its own."""

    def make(self, rng: Random) -> bytes:
        """An input: a real sample, damaged. The same for the same state of ``rng``."""

    def take(self, case: bytes) -> str:
        """Give an input to the code; what came of it, in a few words.

        Raises:
            EdgeLlmError: it is refused, as it should be. Any other exception is a finding.
        """


@dataclass(frozen=True)
class Outcome:
    """What came of one input. ``is_fault``: an exception that is none of ours, or a broken promise."""

    what: str
    is_fault: bool = False


def judge(subject: Subject, case: bytes) -> Outcome:
    """Run one input."""
    try:
        return Outcome(subject.take(case))
    except RequestError as error:
        return Outcome(f"{error.code} {error.name}")
    except EdgeLlmError as error:
        return Outcome(type(error).__name__)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        return Outcome(f"{type(error).__name__}: {error}"[:500], is_fault=True)


def require(condition: bool, promise: str) -> None:
    """Raises ``BrokenPromiseError`` unless ``condition`` holds."""
    if not condition:
        raise BrokenPromiseError(promise)
