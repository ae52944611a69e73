"""Numbers as English speakers say them, 0 to 999, with digits after the point."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import random

_SMALL: Final = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS: Final = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_WORDS: Final = frozenset([*_SMALL, *_TENS, "hundred", "point", "oh"])


def in_words(number: int, *, hyphen: bool = False, hundred_and: bool = True) -> str:
    """0 to 999 in words: 21 is ``twenty one``, 105 ``one hundred and five``."""
    if number < 20:
        return _SMALL[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return _TENS[tens - 2] + (("-" if hyphen else " ") + _SMALL[ones] if ones else "")
    hundreds, rest = divmod(number, 100)
    if not rest:
        return f"{_SMALL[hundreds]} hundred"
    return f"{_SMALL[hundreds]} hundred{' and' if hundred_and else ''} {in_words(rest, hyphen=hyphen)}"


def say_integer(number: int, rng: random.Random) -> str:
    """One way to say or write an integer."""
    if number > 999 or rng.random() < 0.5:
        return str(number)
    text = in_words(number, hyphen=rng.random() < 0.3, hundred_and=rng.random() < 0.5)
    return text.replace("one hundred", "a hundred", 1) if number < 200 and rng.random() < 0.25 else text


def say_number(number: float, decimals: int, rng: random.Random) -> str:
    """One way to say or write a number with a point: 101.5 is ``101.5`` or ``one oh one point five``."""
    text = f"{number:.{decimals}f}"
    whole, _, digits = text.partition(".")
    if not digits.strip("0"):
        return rng.choice([text, whole, say_integer(int(whole), rng)])
    way = rng.random()
    if way < 0.5 or number >= 1000:
        return text
    if way < 0.6:
        return f"{whole} point {' '.join(_SMALL[int(digit)] for digit in digits)}"
    if way < 0.7:
        return f"{whole} point {digits}"
    spelled = " ".join(_SMALL[int(digit)] for digit in whole).replace("zero", "oh") if len(whole) == 3 else ""
    said = spelled if spelled and way < 0.85 else in_words(int(whole), hundred_and=way < 0.93)
    return f"{said} point {' '.join(_SMALL[int(digit)] for digit in digits)}"


def mask_numbers(text: str) -> str:
    """Every number, in digits or words, as one ``#``: for telling whether two utterances are worded the same."""
    words = ["#" if word in _WORDS or re.fullmatch(r"[\d.,]+", word) else word for word in text.split()]
    return re.sub(r"#(?: (?:and )?#)+", "#", " ".join(words))
