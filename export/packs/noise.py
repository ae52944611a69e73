"""How a recogniser, a thumb or a mood changes an utterance: case, punctuation, fillers, hesitation, slips."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Sequence

_PUNCTUATION: Final = re.compile(r"[.,!?;:…，。！？；：]+(?=\s|$)")  # noqa: RUF001
_END: Final = re.compile(r"[\s.,!?;:…。！？]+$")  # noqa: RUF001
_HESITATIONS: Final = (" uh", " um", " er", " like", " erm", ", uh,", " you know")
_APOSTROPHE: Final = re.compile(r"(?<=\w)'(?=\w)")
_ARTICLES: Final = re.compile(r"(?<= )(the|a|an|my|some) ")

_ASIDE_SHARE: Final = 0.06


@dataclass(frozen=True)
class Piece:
    """A stretch of an utterance; ``slot`` is the index of the call and the name of the slot whose value it is."""

    text: str
    slot: tuple[int, str] | None = None


def add_noise(pieces: Sequence[Piece], before: Sequence[str], after: Sequence[str], rng: random.Random) -> list[Piece]:
    """The same words as they might arrive; a slot's value changes with its words.

    Args:
        pieces: the utterance.
        before: fillers that may come first.
        after: fillers that may come last.
        rng: decides.
    """
    noisy = list(pieces)
    is_latin = "".join(piece.text for piece in pieces).isascii()
    if is_latin and before and rng.random() < 0.22:
        noisy = [Piece(rng.choice(before) + rng.choice([" ", " ", ", "])), *_with_first(noisy, lower_first)]
    if is_latin and after and rng.random() < 0.12:
        noisy = [*_without_end(noisy), Piece(" " + rng.choice(after))]
    if is_latin:
        noisy = [_slip(piece, rng) if piece.slot is None else piece for piece in noisy]
    return _styled(noisy, rng)


def add_aside(pieces: Sequence[Piece], before: Sequence[str], after: Sequence[str], rng: random.Random) -> list[Piece]:
    """The utterance, now and then with a remark before or after it that has nothing to do with it.

    Args:
        pieces: the utterance; one that is not in Latin letters stays as it is.
        before: remarks that may come first.
        after: remarks that may come last.
        rng: decides.
    """
    way = rng.random()
    if not "".join(piece.text for piece in pieces).isascii():
        return list(pieces)
    if before and way < _ASIDE_SHARE:
        aside = rng.choice(before)
        aside = aside[:1].upper() + aside[1:]
        joint = rng.choice([". ", ", ", ", so ", " so ", " "])
        return [Piece(aside + joint), *(pieces if joint == ". " else _with_first(pieces, lower_first))]
    if after and way > 1 - _ASIDE_SHARE:
        aside, joint = rng.choice(after), rng.choice([". ", ", ", " "])
        return [*_without_end(pieces), Piece(joint + (aside[:1].upper() + aside[1:] if joint == ". " else aside))]
    return list(pieces)


def _styled(pieces: list[Piece], rng: random.Random) -> list[Piece]:
    way = rng.random()
    if way < 0.34:
        return pieces
    if way < 0.74:  # most recognisers: lower case, no punctuation
        return _mapped(_without_end(pieces), lambda text: _PUNCTUATION.sub("", text).lower())
    if way < 0.82:
        return _mapped(pieces, str.lower)
    if way < 0.86:
        return _mapped(_without_end(pieces), str.upper)
    if way < 0.90:
        # Not the one of "Ana's" after a slot: it parts the value from what follows.
        return _mapped(pieces, lambda text: _APOSTROPHE.sub("", text))
    ended = _without_end(pieces)
    mark = rng.choice([".", ".", "!", "?", ""])
    return [*_with_first(ended, lambda text: text[:1].upper() + text[1:]), *([Piece(mark)] if mark else [])]


def _slip(piece: Piece, rng: random.Random) -> Piece:
    text = piece.text
    if rng.random() < 0.03:
        text = _ARTICLES.sub("", text, count=1)
    spaces = [found.start() for found in re.finditer(r"(?<=\w) (?=\w)", text)]
    if spaces and rng.random() < 0.04:
        at = rng.choice(spaces)
        text = text[:at] + rng.choice(_HESITATIONS) + text[at:]
    elif spaces and rng.random() < 0.02:
        words = text.split(" ")
        index = rng.randrange(len(words))
        text = " ".join([*words[: index + 1], *words[index:]])
    letters = [found.start() for found in re.finditer(r"(?<=[a-z])[a-z](?=[a-z])", text)]
    if letters and rng.random() < 0.025:
        at = rng.choice(letters)
        swapped = text[: at - 1] + text[at] + text[at - 1] + text[at + 1 :]
        text = rng.choice([text[:at] + text[at + 1 :], text[:at] + text[at] + text[at:], swapped])
    return Piece(text, piece.slot)


def _mapped(pieces: Sequence[Piece], change: Callable[[str], str]) -> list[Piece]:
    return [Piece(change(piece.text), piece.slot) for piece in pieces]


def _with_first(pieces: Sequence[Piece], change: Callable[[str], str]) -> list[Piece]:
    first, *rest = pieces
    return [Piece(change(first.text), first.slot), *rest]


def lower_first(text: str) -> str:
    """A sentence as it goes on after other words: its first word in lower case, unless that is "I" or an acronym."""
    first = text.split(" ", 1)[0]
    return (
        text
        if first in ("I", "I'm", "I'd", "I'll", "I've") or first[1:] != first[1:].lower()
        else (text[:1].lower() + text[1:])
    )


def _without_end(pieces: Sequence[Piece]) -> list[Piece]:
    *rest, last = pieces
    return [*rest, Piece(_END.sub("", last.text), last.slot)]
