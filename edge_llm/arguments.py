"""Command-line arguments: one line for what is wrong, and values that make sense."""

from __future__ import annotations

import argparse
import math
from typing import NoReturn


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line and exits with status 2, without repeating the whole usage."""

    def error(self, message: str) -> NoReturn:
        """Exit."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def positive_int(value: str) -> int:
    """A whole number of at least 1."""
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{value!r} is not a whole number of at least 1")
    return number


def non_negative(value: str) -> float:
    """A finite number of at least 0."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise argparse.ArgumentTypeError(f"{value!r} is not a number of at least 0")
    return number


def utf8_text(value: str) -> str:
    """Text; the shell may hand over bytes that are none."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("the text is not UTF-8") from None
    return value
