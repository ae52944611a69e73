"""Numbers in words."""

from __future__ import annotations

import random

import pytest

from export.packs.numbers import in_words, mask_numbers, say_integer, say_number

SMALL = [
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
]
TENS = {"twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90}


def read(words: str) -> int:
    """The number that words say, by adding and multiplying them."""
    total = 0
    for word in words.replace("-", " ").split():
        if word == "hundred":
            total *= 100
        elif word != "and":
            total += 1 if word == "a" else TENS[word] if word in TENS else SMALL.index(word)
    return total


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (20, "twenty"),
        (21, "twenty one"),
        (99, "ninety nine"),
        (100, "one hundred"),
        (105, "one hundred and five"),
        (110, "one hundred and ten"),
        (199, "one hundred and ninety nine"),
        (342, "three hundred and forty two"),
    ],
)
def test_numbers_as_they_are_said(number: int, words: str) -> None:
    assert in_words(number) == words


def test_every_number_to_199_is_said_as_itself() -> None:
    for number in range(200):
        assert read(in_words(number)) == number
        assert read(in_words(number, hyphen=True)) == number
        assert in_words(number, hyphen=True).replace("-", " ") == in_words(number)
        assert in_words(number, hundred_and=False) == in_words(number).replace(" and", "")


def test_every_number_to_199_is_masked_as_one() -> None:
    for number in range(200):
        for said in (str(number), in_words(number), in_words(number, hundred_and=False)):
            assert mask_numbers(f"set it to {said} degrees") == "set it to # degrees"


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("one oh one point five", "#"),
        ("101.5 please", "# please"),
        ("the fan on three and the heat on twenty one", "the fan on # and the heat on #"),
        ("someone else", "someone else"),
        ("a 4x4", "a 4x4"),
        ("", ""),
    ],
)
def test_masking(text: str, masked: str) -> None:
    assert mask_numbers(text) == masked


def test_an_integer_is_said_in_several_ways_that_all_mean_it() -> None:
    rng = random.Random(0)
    for number in (0, 7, 21, 100, 130, 205, 999, 1000, 99_999):
        ways = {say_integer(number, rng) for _ in range(200)}
        assert {int(way) if way.isdecimal() else read(way) for way in ways} == {number}
        assert len(ways) > 1 or number > 999


def test_a_number_with_a_point_is_said_in_several_ways_that_all_mean_it() -> None:
    rng = random.Random(0)

    def number_of(way: str) -> float:
        whole, _, digits = way.replace(" point ", ".").partition(".")
        parts = whole.replace("oh", "zero").split()
        if len(parts) == 3 and all(part in SMALL for part in parts):
            whole = "".join(str(SMALL.index(part)) for part in parts)
        figures = "".join(digit if digit.isdecimal() else str(SMALL.index(digit)) for digit in digits.split())
        return float(f"{whole if whole.isdecimal() else read(whole)}.{figures or 0}")

    for number in (87.5, 88.0, 101.5, 107.9, 0.5, 999.9, 1000.5, 2345.6):
        ways = {say_number(number, 1, rng) for _ in range(200)}
        assert {number_of(way) for way in ways} == {number}
        assert len(ways) > 1 or number > 1000
