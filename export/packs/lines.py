"""One utterance, as a line of a pack is written.

In an intent::

    set the temperature to {temperature_c} degrees          a value of the slot, chosen and spoken by the tool
    make it [twenty one](temperature_c=21) in here          these words mean that value
    drive to [the old mill](destination)                    these words are the value
    I'm freezing | temperature_c=24                         a slot that is not said

In ``[[mixed]]``, where lines name their actions::

    shut my window and call Ana | window.move which=driver action=close; phone.call contact="Ana"
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

from edge_llm.domain.schema import IntegerSlot, NumberSlot, TextSlot, allows, is_complete
from export.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edge_llm.domain.schema import Action, DomainSchema, Slot, SlotValue

_PART: Final = re.compile(r"\{(?P<open>[^{}]*)\}|\[(?P<words>[^\[\]]*)\]\((?P<given>[^()]*)\)")
_BRACKET: Final = re.compile(r"[{}\[\]]")


@dataclass(frozen=True)
class SlotPart:
    """A place of an utterance that says a slot of a call. ``words`` None leaves value and words to the tool."""

    slot: str
    words: str | None = None
    call: int = 0


Part: TypeAlias = str | SlotPart


@dataclass(frozen=True)
class Call:
    """An action with its slots; those that the words of a template leave open are missing."""

    action: str
    slots: Mapping[str, SlotValue] = field(default_factory=dict)


@dataclass(frozen=True)
class Template:
    """A line, parsed. ``where`` is its file and line number."""

    parts: tuple[Part, ...]
    calls: tuple[Call, ...]
    where: str

    @property
    def text(self) -> str:
        """The words as they are written, ``{slot}`` where the tool chooses."""
        return "".join(
            part if isinstance(part, str) else "{" + part.slot + "}" if part.words is None else part.words
            for part in self.parts
        )


def parse_reply_line(line: str, where: str) -> Template:
    """A line of a reply: plain words. Raises ``ExportError`` for a bracket, which would be a slip."""
    if _BRACKET.search(line):
        raise ExportError(f"{where}: a reply's utterances are plain words, without braces or brackets")
    return Template((line,), (), where)


def parse_intent_line(line: str, action: Action, fixed: Mapping[str, SlotValue], where: str) -> Template:
    """A line of an intent.

    Args:
        line: as in the module's docstring.
        action: the intent's.
        fixed: slots that the intent gives to all its lines.
        where: file and line, for the message.

    Raises:
        ExportError: a slot is unknown, missing, given twice, or has a value that it does not allow.
    """
    words, _, given = line.partition(" | ")
    slots: dict[str, SlotValue] = dict(fixed)
    for assignment in filter(None, map(str.strip, given.split(","))):
        name, unsaid = _assignment(assignment, action, where)
        _check_said_apart(action, name, where)
        _add(slots, name, unsaid, where)
    open_slots: set[str] = set()
    parts: list[Part] = []
    end = 0
    for found in _PART.finditer(words):
        parts.append(words[end : found.start()])
        end = found.end()
        part, value = _slot_part(found, action, where)
        parts.append(part)
        if part.slot in slots or part.slot in open_slots:
            raise ExportError(f"{where}: slot {part.slot!r} is given twice")
        if value is None:
            open_slots.add(part.slot)
        else:
            slots[part.slot] = value
    parts.append(words[end:])
    plain = tuple(part for part in parts if part != "")
    if any(isinstance(part, str) and _BRACKET.search(part) for part in plain):
        raise ExportError(f"{where}: a bracket is not closed, or [words] are not followed by (slot=value)")
    # What the tool chooses counts as given; its value is not known yet.
    _check_complete(action, {**slots, **dict.fromkeys(sorted(open_slots), "")}, where)
    return Template(plain, (Call(action.name, slots),), where)


def parse_mixed_line(line: str, schema: DomainSchema, where: str) -> Template:
    """A line that names its actions. Raises ``ExportError`` as ``parse_intent_line`` does."""
    words, bar, calls_text = line.partition(" | ")
    if _BRACKET.search(words) or not words.strip():
        raise ExportError(f"{where}: give plain words before ` | `, without braces or brackets")
    if not bar:
        raise ExportError(f"{where}: the actions are missing: add ` | action slot=value`")
    calls = tuple(_call(call, schema, words, where) for call in _split_outside_quotes(calls_text))
    if len(calls) > schema.max_actions:
        raise ExportError(f"{where}: at most {schema.max_actions} actions in one utterance")
    return Template(mark_text_slots(words.strip(), calls, schema, where), calls, where)


def convert_value(slot: Slot, text: str, name: str, where: str) -> SlotValue:
    """A written value with its slot's type. Raises ``ExportError`` if the slot does not allow it."""
    value: SlotValue = text
    try:
        if isinstance(slot, IntegerSlot):
            value = int(text)
        elif isinstance(slot, NumberSlot):
            value = float(text)
    except ValueError:
        raise ExportError(f"{where}: slot {name!r} wants a number, not {text!r}") from None
    if not allows(slot, value):
        raise ExportError(f"{where}: slot {name!r} does not allow {text!r}")
    return value


def _slot_part(found: re.Match[str], action: Action, where: str) -> tuple[SlotPart, SlotValue | None]:
    if found["open"] is not None:
        name = found["open"].strip()
        _slot_of(action, name, where)
        return SlotPart(name), None
    words, given = found["words"], found["given"]
    if not words.strip():
        raise ExportError(f"{where}: no words between the brackets")
    if "=" in given:
        name, value = _assignment(given, action, where)
        _check_said_apart(action, name, where)
        return SlotPart(name, words), value
    name = given.strip()
    if not isinstance(_slot_of(action, name, where), TextSlot):
        raise ExportError(f"{where}: say what [{words}] means: [{words}]({name}=value)")
    return SlotPart(name, words), words


def _assignment(text: str, action: Action, where: str) -> tuple[str, SlotValue]:
    name, equals, value = (piece.strip() for piece in text.partition("="))
    if not equals:
        raise ExportError(f"{where}: {text!r} is not slot=value")
    return name, convert_value(_slot_of(action, name, where), value, name, where)


def _slot_of(action: Action, name: str, where: str) -> Slot:
    slot = action.slots.get(name)
    if slot is None:
        known = ", ".join(action.slots) or "none"
        raise ExportError(f"{where}: action {action.name} has no slot {name!r}, only: {known}")
    return slot


def _check_said_apart(action: Action, name: str, where: str) -> None:
    """A text slot holds the user's own words, so its value cannot be given beside them."""
    if isinstance(action.slots[name], TextSlot):
        raise ExportError(f"{where}: {name!r} holds words of the utterance: write [words]({name}) or {{{name}}}")


def _add(slots: dict[str, SlotValue], name: str, value: SlotValue, where: str) -> None:
    if name in slots:
        raise ExportError(f"{where}: slot {name!r} is given twice")
    slots[name] = value


def _check_complete(action: Action, slots: dict[str, SlotValue], where: str) -> None:
    if not is_complete(action, slots):
        needed = [name for name in action.slots if name not in action.one_of]
        needed += [f"one of {' and '.join(action.one_of)}"] if action.one_of else []
        raise ExportError(f"{where}: {action.name} needs {', '.join(needed) or 'no slot'}; here: {[*slots]}")


def _call(text: str, schema: DomainSchema, words: str, where: str) -> Call:
    try:
        name, *assignments = shlex.split(text)
    except ValueError as error:
        raise ExportError(f"{where}: cannot read {text.strip()!r}: {error}") from None
    action = schema.action(name)
    if action is None:
        raise ExportError(f"{where}: there is no action {name!r}")
    slots: dict[str, SlotValue] = {}
    for assignment in assignments:
        slot_name, value = _assignment(assignment, action, where)
        if isinstance(action.slots[slot_name], TextSlot) and _find_words(str(value), words) is None:
            raise ExportError(f"{where}: {slot_name!r} must be words of the utterance, which has no {value!r}")
        _add(slots, slot_name, value, where)
    _check_complete(action, slots, where)
    return Call(action.name, slots)


def mark_text_slots(words: str, calls: Sequence[Call], schema: DomainSchema, where: str) -> tuple[Part, ...]:
    """The words with the values of text slots as parts of their own; all of them are somewhere in the words."""
    parts: list[Part] = [words]
    for number, call in enumerate(calls):
        action = schema.action(call.action)
        assert action is not None
        for name in (name for name in call.slots if isinstance(action.slots[name], TextSlot)):
            for index, part in enumerate(parts):
                found = _find_words(str(call.slots[name]), part) if isinstance(part, str) else None
                if isinstance(part, str) and found is not None:
                    said = SlotPart(name, found.group(), number)
                    parts[index : index + 1] = [part[: found.start()], said, part[found.end() :]]
                    break
            else:
                raise ExportError(f"{where}: {call.slots[name]!r} cannot be the value of two slots: say it twice")
    return tuple(part for part in parts if part != "")


def _find_words(value: str, words: str) -> re.Match[str] | None:
    """Where words are said, whatever their case; a part of a word is not said, but in scripts without spaces."""
    before, after = (r"(?<!\w)", r"(?!\w)") if value.isascii() else ("", "")
    return re.search(before + re.escape(value) + after, words, re.IGNORECASE)


def _split_outside_quotes(text: str) -> list[str]:
    pieces = re.findall(r"""(?:"[^"]*"|[^;"])+""", text)
    return [piece for piece in pieces if piece.strip()]
