"""The trace: who says what, word by word, what the recogniser makes of it, and when. The same for the same seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from benchmarks.voice.words import SOUND_ALIKES, USERS, say

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

SEED: Final = 20
REPEATED_SHARE: Final = 0.3
REVISED_SHARE: Final = 0.25
# Of what is repeated, this share is spelt a little differently.
VARIED_SHARE: Final = 0.4
WORDS_PER_MINUTE: Final = 150
_JITTER: Final = 0.4
_MIN_SPLIT_LETTERS: Final = 6
_CLOSING: Final = ".?!"

RevisionKind = Literal["wrong", "merged", "split"]


@dataclass(frozen=True)
class Transcript:
    """All that has been recognised ``at_s`` seconds after the speaker began."""

    at_s: float
    text: str


@dataclass(frozen=True)
class Revision:
    """A mistake that the recogniser takes back ``held`` words later.

    ``shown`` stands for the ``count`` words from ``index`` on.
    """

    kind: RevisionKind
    index: int
    count: int
    shown: str
    held: int


@dataclass(frozen=True)
class Utterance:
    """One query and how it was heard.

    Attributes:
        transcripts: one after each word; the last is the query, sent when its last word ends.
        asked_before: the same user has asked the same before, whatever its case and closing punctuation were.
    """

    id: str
    user: str
    transcripts: tuple[Transcript, ...]
    asked_before: bool
    revision: Revision | None

    @property
    def text(self) -> str:
        """The query."""
        return self.transcripts[-1].text

    @property
    def partials(self) -> tuple[Transcript, ...]:
        """What is published before the query."""
        return self.transcripts[:-1]

    @property
    def duration_s(self) -> float:
        """From the first sound to the end of the last word."""
        return self.transcripts[-1].at_s


def make_trace(count: int, seed: int = SEED) -> list[Utterance]:
    """``count`` utterances; the shares of repeated and of revised ones are exact, but for rounding."""
    rng = random.Random(seed)
    fresh = fresh_queries(rng)
    # Something has to be said before it can be said again.
    repeated = set(rng.sample(range(min(5, count), count), min(round(count * REPEATED_SHARE), max(0, count - 5))))
    revised = set(rng.sample(range(count), round(count * REVISED_SHARE)))
    asked: dict[str, list[str]] = {}
    trace = []
    for number in range(count):
        if number in repeated:
            user = rng.choice(sorted(asked))
            text = _choose_repeat(rng, asked[user])
        else:
            user, text = next(fresh)
            asked.setdefault(user, []).append(text)
        revision = _make_revision(rng, text.split()) if number in revised else None
        transcripts = tuple(_transcripts(rng, text, revision))
        trace.append(Utterance(f"u{number}", user, transcripts, number in repeated, revision))
    return trace


def fresh_queries(rng: random.Random, known: Iterable[Utterance] = ()) -> Iterator[tuple[str, str]]:
    """Endless (user, text), no text twice and none of the ``known``."""
    users = sorted(USERS)
    seen = {normalised(utterance.text) for utterance in known}
    while True:
        user = rng.choice(users)
        text = say(rng, USERS[user])
        if (key := normalised(text)) not in seen:
            seen.add(key)
            yield user, text


def repeats(rng: random.Random, trace: Sequence[Utterance]) -> Iterator[tuple[str, str]]:
    """Endless (user, text) of what a trace's users have asked, some of it oftener, some of it spelt differently."""
    asked: dict[str, list[str]] = {}
    for utterance in trace:
        if not utterance.asked_before:
            asked.setdefault(utterance.user, []).append(utterance.text)
    while True:
        user = rng.choice(sorted(asked))
        yield user, _choose_repeat(rng, asked[user])


def normalised(text: str) -> str:
    """What two spellings of one query have in common."""
    return " ".join(text.casefold().split()).rstrip(_CLOSING + " ")


def _choose_repeat(rng: random.Random, asked: Sequence[str]) -> str:
    """A user's first query is repeated most, the n-th 1/n as often (Zipf's law)."""
    text = rng.choices(asked, [1 / rank for rank in range(1, len(asked) + 1)])[0]
    return _respelt(rng, text) if rng.random() < VARIED_SHARE else text


def _respelt(rng: random.Random, text: str) -> str:
    bare = text.rstrip(_CLOSING)
    return rng.choice([text.lower(), bare, bare.lower(), bare + ".", bare[0].lower() + bare[1:] + "?"])


def _transcripts(rng: random.Random, text: str, revision: Revision | None) -> Iterator[Transcript]:
    words = text.split()
    at_s = 0.0
    for heard in range(1, len(words) + 1):
        at_s += 60 / WORDS_PER_MINUTE * rng.uniform(1 - _JITTER, 1 + _JITTER)
        # Closing punctuation comes with the last word: the recogniser knows only then that the sentence is complete.
        yield Transcript(round(at_s, 3), " ".join(_shown(words[:heard], revision)))


def _shown(words: list[str], revision: Revision | None) -> list[str]:
    if revision is None:
        return words
    end = revision.index + revision.count
    if not end <= len(words) < end + revision.held:
        return words
    return [*words[: revision.index], revision.shown, *words[end:]]


def _make_revision(rng: random.Random, words: Sequence[str]) -> Revision:
    """A mistake that is put right by the last word at the latest, so that the query is right."""
    held = rng.choice([1, 2])
    long_words = [index for index in range(len(words) - held) if len(words[index]) >= _MIN_SPLIT_LETTERS]
    kind: RevisionKind = rng.choices(("wrong", "merged", "split"), (6, 2, 2))[0]
    if kind == "split" and long_words:
        index = rng.choice(long_words)
        word = words[index]
        cut = len(word) // 2
        return Revision("split", index, 1, f"{word[:cut]} {word[cut:]}", held)
    if kind == "merged":
        index = rng.randrange(len(words) - 1 - held)
        return Revision("merged", index, 2, words[index] + words[index + 1].lower(), held)
    index = rng.randrange(len(words) - held)
    return Revision("wrong", index, 1, _misheard(words[index]), held)


def _misheard(word: str) -> str:
    heard = SOUND_ALIKES.get(word.lower())
    if heard is None:
        return word[:-1] if len(word) > 3 else word + "s"
    return heard.capitalize() if word[0].isupper() else heard


def spoken_s(trace: Sequence[Utterance]) -> float:
    """How long all of it takes to say."""
    return sum(utterance.duration_s for utterance in trace)
