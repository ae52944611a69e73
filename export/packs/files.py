"""What the TOML files of a pack may hold; docs/domain-packs.md describes every key."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

from edge_llm.domain.schema import ActionName, ChoiceValue, Name, Sentence, StateValue


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Frozen, and an unknown key is an error."""


class PackFile(_Strict, frozen=True, kw_only=True):
    """pack.toml."""

    name: Annotated[str, Meta(pattern="^[a-z][a-z0-9-]{0,39}$")]
    version: str
    language: str
    license: str
    description: str
    failure: Sentence
    min_confidence: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    max_actions: Annotated[int, Meta(ge=1, le=8)] = 3
    fillers_before: tuple[str, ...] = ()
    fillers_after: tuple[str, ...] = ()
    joiners: tuple[str, ...] = ("and",)
    asides_before_file: str = ""
    asides_after_file: str = ""
    state: dict[Name, StateValue] = {}
    examples: tuple[Sentence, ...] = ()


class IntegerKeys(_Strict, frozen=True, kw_only=True, tag="integer"):
    """A slot of type integer in actions.toml."""

    min: Annotated[int, Meta(ge=0, le=99_999)]
    max: Annotated[int, Meta(ge=0, le=99_999)]
    out_of_range: Sentence


class NumberKeys(_Strict, frozen=True, kw_only=True, tag="number"):
    """A slot of type number."""

    min: Annotated[float, Meta(ge=0, le=99_999)]
    max: Annotated[float, Meta(ge=0, le=99_999)]
    out_of_range: Sentence
    decimals: Annotated[int, Meta(ge=1, le=3)] = 1


class ChoiceWords(_Strict, frozen=True, kw_only=True):
    """How one value of a choice is said in answers, and by people."""

    say: Sentence
    spoken: tuple[str, ...]


class ChoiceKeys(_Strict, frozen=True, kw_only=True, tag="choice"):
    """A slot of type choice."""

    values: Annotated[dict[ChoiceValue, ChoiceWords], Meta(min_length=1, max_length=64)]


class TextKeys(_Strict, frozen=True, kw_only=True, tag="text"):
    """A slot of type text."""

    values_file: str
    max_words: Annotated[int, Meta(ge=1, le=32)] = 12


SlotKeys: TypeAlias = IntegerKeys | NumberKeys | ChoiceKeys | TextKeys


class ActionKeys(_Strict, frozen=True, kw_only=True):
    """One `[[action]]`."""

    name: ActionName
    confirm: bool = False
    one_of: tuple[Name, ...] = ()
    slots: dict[Name, SlotKeys] = {}


class ActionsFile(_Strict, frozen=True, kw_only=True):
    """actions.toml."""

    action: Annotated[tuple[ActionKeys, ...], Meta(min_length=1)]


class IntentKeys(_Strict, frozen=True, kw_only=True):
    """One `[[intent]]`."""

    name: str
    action: ActionName
    answer: Sentence
    slots: dict[Name, str | int | float] = {}
    utterances: str
    held_out: str = ""


class MixedKeys(_Strict, frozen=True, kw_only=True):
    """One `[[mixed]]`: lines that name their actions themselves."""

    name: str = ""
    utterances: str = ""
    held_out: str = ""


class IntentsFile(_Strict, frozen=True, kw_only=True):
    """A file of intents/."""

    intent: tuple[IntentKeys, ...] = ()
    mixed: tuple[MixedKeys, ...] = ()


class ReplyKeys(_Strict, frozen=True, kw_only=True):
    """One `[[reply]]`."""

    kind: Literal["fact", "refusal", "chat"]
    name: str
    answer: Sentence
    utterances: str
    held_out: str = ""


class RepliesFile(_Strict, frozen=True, kw_only=True):
    """A file of replies/."""

    reply: Annotated[tuple[ReplyKeys, ...], Meta(min_length=1)]


class TestedKeys(_Strict, frozen=True, kw_only=True):
    """One `[[mixed]]` or `[[reply]]` of lines that are only tested on; a reply is named as in replies/."""

    name: str = ""
    held_out: str


class TestedFile(_Strict, frozen=True, kw_only=True):
    """A file of held_out/ or blind/."""

    mixed: tuple[TestedKeys, ...] = ()
    reply: tuple[TestedKeys, ...] = ()
