"""``domain.json``: the actions that a domain bundle may ask for, shared by export/packs and the daemon.

A domain model answers in a fixed form, behind tokens that user text can never become::

    <|command|> <|action window.move|> <|slot which|> driver <|slot action|> open <|say|> Opening <|value which|>.
    <|fact|> <|say|> A heat pump moves heat instead of making it.

Two actions are followed by two ``<|say|>`` parts, in the same order. ``<|value …|>`` stands for a slot of that part's
action, or for a value that the host publishes.
"""

from __future__ import annotations

import math
from typing import Annotated, Final, Literal, TypeAlias

import msgspec
from msgspec import Meta

from edge_llm.errors import ManifestError

DOMAIN_FILE: Final = "domain.json"
MAX_DOMAIN_BYTES: Final = 1 << 20

Kind: TypeAlias = Literal["command", "fact", "refusal", "chat"]
KINDS: Final[tuple[Kind, ...]] = ("command", "fact", "refusal", "chat")
SlotValue: TypeAlias = int | float | str

USER_TOKEN: Final = "<|user|>"
REPLY_TOKEN: Final = "<|reply|>"
END_TOKEN: Final = "<|end|>"
SAY_TOKEN: Final = "<|say|>"

# Sentences and lists that a product team writes; bounded so that a hostile bundle cannot exhaust a board's memory.
Sentence = Annotated[str, Meta(min_length=1, max_length=500)]
Name = Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_]{0,39}$")]
ActionName = Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_]{0,39}(\.[a-z][a-z0-9_]{0,39})?$")]
# Written into one token sequence with a space before it, and read back: no space, no quote inside.
ChoiceValue = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$")]


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Frozen, and a field that the schema does not know is an error."""


class IntegerSlot(_Strict, frozen=True, kw_only=True, tag="integer", tag_field="type"):
    """A whole number from ``min`` to ``max``, both included."""

    min: Annotated[int, Meta(ge=0, le=99_999)]
    max: Annotated[int, Meta(ge=0, le=99_999)]


class NumberSlot(_Strict, frozen=True, kw_only=True, tag="number", tag_field="type"):
    """A number from ``min`` to ``max`` with ``decimals`` digits after the point."""

    min: Annotated[float, Meta(ge=0, le=99_999)]
    max: Annotated[float, Meta(ge=0, le=99_999)]
    decimals: Annotated[int, Meta(ge=1, le=3)] = 1


class ChoiceSlot(_Strict, frozen=True, kw_only=True, tag="choice", tag_field="type"):
    """One of ``values``; each maps to the words by which an answer says it."""

    values: Annotated[dict[ChoiceValue, Sentence], Meta(min_length=1, max_length=64)]


class TextSlot(_Strict, frozen=True, kw_only=True, tag="text", tag_field="type"):
    """Words that the user said, at most ``max_words`` in a row."""

    max_words: Annotated[int, Meta(ge=1, le=32)] = 12


Slot: TypeAlias = IntegerSlot | NumberSlot | ChoiceSlot | TextSlot


class Action(_Strict, frozen=True, kw_only=True):
    """Something that the host can be asked to do.

    ``one_of`` names slots of which exactly one is given; every other slot is. ``confirm`` tells the host to ask back.
    """

    name: ActionName
    confirm: bool = False
    slots: Annotated[dict[Name, Slot], Meta(max_length=8)] = {}
    one_of: tuple[Name, ...] = ()


class StateValue(_Strict, frozen=True, kw_only=True):
    """A value that the host publishes; ``fallback`` is said instead of the sentence while it is missing.

    ``example`` is what ``edge-llm demo`` publishes in the host's place.
    """

    type: Literal["integer", "number", "text"]
    fallback: Sentence
    example: int | float | str | None = None


class DomainSchema(_Strict, frozen=True, kw_only=True):
    """The whole of ``domain.json``.

    ``failure`` is said when the model asked for something that the schema forbids, or for an action that it is not as
    sure of as ``min_confidence``; ``examples`` are what ``edge-llm demo`` asks.
    """

    format: Literal[1]
    name: str
    version: str
    failure: Sentence
    max_actions: Annotated[int, Meta(ge=1, le=8)] = 3
    min_confidence: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    actions: Annotated[tuple[Action, ...], Meta(max_length=512)]
    state: Annotated[dict[Name, StateValue], Meta(max_length=128)] = {}
    examples: Annotated[tuple[Sentence, ...], Meta(max_length=32)] = ()

    def action(self, name: str) -> Action | None:
        """The action of that name, or None."""
        return next((action for action in self.actions if action.name == name), None)

    def special_tokens(self) -> list[str]:
        """Every token that the form needs, in a fixed order."""
        slots = dict.fromkeys(name for action in self.actions for name in action.slots)
        return [
            USER_TOKEN,
            REPLY_TOKEN,
            END_TOKEN,
            SAY_TOKEN,
            *map(kind_token, KINDS),
            *(action_token(action.name) for action in self.actions),
            *map(slot_token, slots),
            *map(value_token, dict.fromkeys([*slots, *self.state])),
        ]


def kind_token(kind: Kind) -> str:
    """The token that begins an answer of a kind."""
    return f"<|{kind}|>"


def action_token(name: str) -> str:
    """The token that names an action."""
    return f"<|action {name}|>"


def slot_token(name: str) -> str:
    """The token that a slot's value follows."""
    return f"<|slot {name}|>"


def value_token(name: str) -> str:
    """The token that stands for a slot or a value of the host inside an answer."""
    return f"<|value {name}|>"


def written(slot: Slot, value: SlotValue) -> str:
    """A slot's value as the model writes it: digits as they are, words with a space before them."""
    if isinstance(slot, IntegerSlot):
        return str(value)
    if isinstance(slot, NumberSlot):
        return f"{value:.{slot.decimals}f}"
    return f" {value}"


def spoken(slot: Slot, value: SlotValue) -> str:
    """A slot's value as an answer says it."""
    if isinstance(slot, ChoiceSlot):
        return slot.values[str(value)]
    if isinstance(slot, NumberSlot):
        return f"{value:.8g}"  # as many digits as there can be
    return str(value)


def read_value(slot: Slot, text: str) -> SlotValue | None:
    """The value that a model wrote, or None if the slot does not allow it."""
    if isinstance(slot, IntegerSlot):
        # isdecimal alone would take other scripts' digits, and int refuses thousands of them with an exception.
        is_number = text.isascii() and text.isdecimal() and len(text) <= len(str(slot.max))
        return _bounded(int(text), slot.min, slot.max) if is_number else None
    if isinstance(slot, NumberSlot):
        try:
            number = float(text)
        except ValueError:
            return None
        exact = math.isfinite(number) and text == written(slot, number) and not text.startswith("-")
        return _bounded(number, slot.min, slot.max) if exact else None
    text = text.strip()
    if isinstance(slot, ChoiceSlot):
        return text if text in slot.values else None
    return text or None


def allows(slot: Slot, value: object) -> bool:
    """Whether a slot may have a value, given with its own type."""
    if isinstance(slot, IntegerSlot):
        return type(value) is int and slot.min <= value <= slot.max
    if isinstance(slot, NumberSlot):
        return type(value) in (int, float) and slot.min <= value <= slot.max  # type: ignore[operator]
    if isinstance(slot, ChoiceSlot):
        return value in slot.values
    return isinstance(value, str) and bool(value.strip())


def is_complete(action: Action, slots: dict[str, SlotValue]) -> bool:
    """Whether ``slots`` are just those that the action needs."""
    needed = set(action.slots) - set(action.one_of)
    chosen = set(slots) & set(action.one_of)
    return set(slots) - chosen == needed and len(chosen) == (1 if action.one_of else 0)


def decode_domain(raw: bytes) -> DomainSchema:
    """Parse ``domain.json``. Raises ``ManifestError`` naming the field that is wrong."""
    try:
        schema = msgspec.json.decode(raw, type=DomainSchema)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ManifestError(f"{DOMAIN_FILE} is not valid: {error}") from None
    check_domain(schema)
    return schema


def encode_domain(schema: DomainSchema) -> bytes:
    """Serialise, readable by people; the inverse of ``decode_domain``."""
    return msgspec.json.format(msgspec.json.encode(schema), indent=1) + b"\n"


def check_domain(schema: DomainSchema) -> None:
    """Raises ``ManifestError`` for what types alone cannot forbid."""
    names = [action.name for action in schema.actions]
    if len(set(names)) != len(names):
        raise ManifestError(f"{DOMAIN_FILE} defines an action twice")
    for action in schema.actions:
        unknown = [name for name in action.one_of if name not in action.slots]
        if unknown or len(set(action.one_of)) == 1:
            raise ManifestError(f"{DOMAIN_FILE}: one_of of {action.name} must name two or more of its slots")
        places = [index for index, name in enumerate(action.slots) if name in action.one_of]
        if places and places[-1] - places[0] >= len(places):
            # Slots are written in their order, and the alternatives at one place.
            raise ManifestError(f"{DOMAIN_FILE}: the slots that one_of of {action.name} names must stand together")
        for name, slot in action.slots.items():
            if isinstance(slot, IntegerSlot | NumberSlot) and slot.min > slot.max:
                raise ManifestError(f"{DOMAIN_FILE}: {action.name}.{name} has min {slot.min} above max {slot.max}")
            if isinstance(slot, NumberSlot) and any(float(written(slot, end)) != end for end in (slot.min, slot.max)):
                raise ManifestError(
                    f"{DOMAIN_FILE}: {action.name}.{name} has a bound of more than {slot.decimals} decimals"
                )
    both = {name for action in schema.actions for name in action.slots} & set(schema.state)
    if both:
        raise ManifestError(f"{DOMAIN_FILE}: {min(both)!r} is both a slot and a state value: rename one")


def _bounded(number: SlotValue, low: float, high: float) -> SlotValue | None:
    return number if isinstance(number, int | float) and low <= number <= high else None
