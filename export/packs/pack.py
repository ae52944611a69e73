"""A domain pack in memory, read from its folder by ``load_pack``::

    PACK/pack.toml            name, licence, fillers, state values, the failure sentence
    PACK/actions.toml         every action with its slots
    PACK/intents/*.toml       utterances of the actions, with the answer
    PACK/replies/*.toml       facts, small talk and what is refused
    PACK/held_out/*.toml      more utterances that are only ever tested on
    PACK/blind/*.toml         the same, and nobody who writes the pack looks at how a student fails on them
    PACK/values/*.txt         values of text slots, and asides, one a line

docs/domain-packs.md describes every key.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal

from edge_llm.domain.schema import (
    Action,
    ChoiceSlot,
    DomainSchema,
    IntegerSlot,
    NumberSlot,
    TextSlot,
    decode_domain,
    encode_domain,
)
from edge_llm.errors import ManifestError
from export.errors import ExportError
from export.packs.check import check_templates
from export.packs.files import (
    ActionsFile,
    ChoiceKeys,
    IntegerKeys,
    IntentKeys,
    IntentsFile,
    NumberKeys,
    PackFile,
    RepliesFile,
    SlotKeys,
    TestedFile,
)
from export.packs.lines import (
    Call,
    Template,
    convert_value,
    parse_intent_line,
    parse_mixed_line,
    parse_reply_line,
)
from export.packs.located_toml import LocatedToml

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Mapping
    from pathlib import Path

    from edge_llm.domain.schema import Slot, SlotValue

_PLACEHOLDER: Final = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class SlotWords:
    """What only the tool needs of a slot: how its values are said, and what is said of a value out of range.

    ``spoken`` maps each choice to its words; ``values`` are those of a text slot; both are empty for a number.
    """

    spoken: Mapping[str, tuple[str, ...]]
    values: tuple[str, ...]
    out_of_range: str


@dataclass(frozen=True)
class Intent:
    """Utterances that mean one action, and the answer to them."""

    name: str
    action: str
    slots: Mapping[str, SlotValue]
    answer: str
    templates: tuple[Template, ...]


@dataclass(frozen=True)
class Reply:
    """Utterances that are answered in words alone."""

    name: str
    kind: Literal["fact", "refusal", "chat"]
    answer: str
    templates: tuple[Template, ...]
    held_out: tuple[Template, ...]
    blind: tuple[Template, ...] = ()


@dataclass(frozen=True)
class Pack:
    """A valid pack. ``mixed``, ``held_out`` and ``blind`` are commands that name their actions themselves."""

    schema: DomainSchema
    license: str
    description: str
    fillers_before: tuple[str, ...]
    fillers_after: tuple[str, ...]
    joiners: tuple[str, ...]
    asides_before: tuple[str, ...]
    asides_after: tuple[str, ...]
    words: Mapping[tuple[str, str], SlotWords]
    intents: tuple[Intent, ...]
    replies: tuple[Reply, ...]
    mixed: tuple[Template, ...]
    held_out: tuple[Template, ...]
    blind: tuple[Template, ...]

    def judged_blind(self) -> Pack:
        """The pack with its blind lines in the place of the held-out ones."""
        replies = tuple(replace(reply, held_out=reply.blind) for reply in self.replies)
        return replace(self, held_out=self.blind, replies=replies)

    def action(self, name: str) -> Action:
        """An action that a template of the pack names."""
        action = self.schema.action(name)
        assert action is not None, "templates were checked against the schema"
        return action

    def answer(self, call: Call) -> str:
        """What is said to an action: the answer of the intent that says the most about its slots."""
        return max(self.answering(call), key=lambda intent: len(intent.slots)).answer

    def answering(self, call: Call) -> list[Intent]:
        """The intents whose answers fit an action; none for no template of a valid pack."""
        return [
            intent
            for intent in self.intents
            if intent.action == call.action
            and intent.slots.items() <= call.slots.items()
            and all(name in call.slots or name in self.schema.state for name in _PLACEHOLDER.findall(intent.answer))
        ]


def load_pack(folder: Path) -> Pack:
    """Read and check a pack.

    Raises:
        ExportError: something is missing or wrong; the message names file and line.
    """
    if not (folder / "pack.toml").is_file():
        raise ExportError(f"{folder} is not a domain pack: it has no pack.toml")
    about_toml = LocatedToml(folder / "pack.toml")
    about = about_toml.convert(PackFile)
    asides = {
        key: _read_values(folder, name, about_toml.where(key)) if name else ()
        for key, name in (
            ("asides_before_file", about.asides_before_file),
            ("asides_after_file", about.asides_after_file),
        )
    }
    actions_toml = LocatedToml(folder / "actions.toml")
    actions = actions_toml.convert(ActionsFile).action
    schema = DomainSchema(
        format=1,
        name=about.name,
        version=about.version,
        failure=about.failure,
        min_confidence=about.min_confidence,
        max_actions=about.max_actions,
        actions=tuple(
            Action(
                name=action.name,
                confirm=action.confirm,
                slots={name: _schema_slot(slot) for name, slot in action.slots.items()},
                one_of=action.one_of,
            )
            for action in actions
        ),
        state=about.state,
        examples=about.examples,
    )
    try:
        # As the device will: it also checks what a struct made in memory may hold.
        decode_domain(encode_domain(schema))
    except ManifestError as error:
        raise ExportError(f"{actions_toml.path}: {error}") from None
    words = {
        (action.name, name): _slot_words(slot, folder, actions_toml.where(f"action[{index}].slots.{name}"), schema)
        for index, action in enumerate(actions)
        for name, slot in action.slots.items()
    }
    intents, mixed, held_out = _read_intents(folder, schema)
    tested, blind = (_read_tested(folder / name, schema) for name in ("held_out", "blind"))
    replies = _with_tested(_read_replies(folder), tested, blind)
    silent = [action.name for action in schema.actions if not any(i.action == action.name for i in intents)]
    if silent:
        raise ExportError(f"{folder}: no intent asks for the action {silent[0]!r}: write one, or remove the action")
    pack = Pack(
        schema=schema,
        license=about.license,
        description=about.description,
        fillers_before=about.fillers_before,
        fillers_after=about.fillers_after,
        joiners=about.joiners,
        asides_before=asides["asides_before_file"],
        asides_after=asides["asides_after_file"],
        words=words,
        intents=intents,
        replies=replies,
        mixed=mixed,
        held_out=(*held_out, *tested.commands),
        blind=tuple(blind.commands),
    )
    check_templates(pack)
    return pack


def _schema_slot(slot: SlotKeys) -> Slot:
    if isinstance(slot, IntegerKeys):
        return IntegerSlot(min=slot.min, max=slot.max)
    if isinstance(slot, NumberKeys):
        return NumberSlot(min=slot.min, max=slot.max, decimals=slot.decimals)
    if isinstance(slot, ChoiceKeys):
        return ChoiceSlot(values={value: words.say for value, words in slot.values.items()})
    return TextSlot(max_words=slot.max_words)


def _slot_words(slot: SlotKeys, folder: Path, where: str, schema: DomainSchema) -> SlotWords:
    if isinstance(slot, IntegerKeys | NumberKeys):
        _check_placeholders(slot.out_of_range, schema.state, f"{where}: out_of_range")
        return SlotWords({}, (), slot.out_of_range)
    if isinstance(slot, ChoiceKeys):
        return SlotWords({value: words.spoken for value, words in slot.values.items()}, (), "")
    values = _read_values(folder, slot.values_file, where)
    longest = max(values, key=lambda value: len(value.split()))
    if len(longest.split()) > slot.max_words:
        raise ExportError(f"{where}: {longest!r} of {slot.values_file} has more words than max_words, {slot.max_words}")
    return SlotWords({}, values, "")


def _read_values(folder: Path, name: str, where: str) -> tuple[str, ...]:
    path = folder / "values" / name
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"{where}: cannot read {path}: {error}") from None
    values = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not values:
        raise ExportError(f"{where}: {path} holds no value")
    return values


def _read_intents(
    folder: Path, schema: DomainSchema
) -> tuple[tuple[Intent, ...], tuple[Template, ...], tuple[Template, ...]]:
    intents: list[Intent] = []
    mixed: list[Template] = []
    held_out: list[Template] = []
    for path in sorted((folder / "intents").glob("*.toml")):
        toml = LocatedToml(path)
        content = toml.convert(IntentsFile)
        for index, entry in enumerate(content.intent):
            intent, tested = _read_intent(entry, f"intent[{index}]", toml, schema)
            if any(intent.name == other.name for other in intents):
                raise ExportError(f"{toml.where(f'intent[{index}].name')}: there are two intents {intent.name!r}")
            intents.append(intent)
            held_out += tested
        for index, block in enumerate(content.mixed):
            for key, text, found in (("utterances", block.utterances, mixed), ("held_out", block.held_out, held_out)):
                lines = toml.text_lines(f"mixed[{index}].{key}", text)
                found += [parse_mixed_line(line, schema, where) for line, where in lines]
    return tuple(intents), tuple(mixed), tuple(held_out)


def _read_intent(entry: IntentKeys, key: str, toml: LocatedToml, schema: DomainSchema) -> tuple[Intent, list[Template]]:
    action = schema.action(entry.action)
    if action is None:
        raise ExportError(f"{toml.where(f'{key}.action')}: there is no action {entry.action!r} in actions.toml")
    where = toml.where(f"{key}.slots")
    fixed: dict[str, SlotValue] = {}
    for name, value in entry.slots.items():
        if name not in action.slots:
            raise ExportError(f"{where}: action {action.name} has no slot {name!r}")
        if isinstance(action.slots[name], TextSlot):
            raise ExportError(f"{where}: {name!r} holds words of the utterance, so an intent cannot give it")
        fixed[name] = convert_value(action.slots[name], str(value), name, where)
    _check_placeholders(entry.answer, {**action.slots, **schema.state}, toml.where(f"{key}.answer"))
    lines = toml.text_lines(f"{key}.utterances", entry.utterances)
    templates = tuple(parse_intent_line(line, action, fixed, place) for line, place in lines)
    if not templates:
        raise ExportError(f"{toml.where(f'{key}.utterances')}: intent {entry.name!r} has no utterance")
    tested = toml.text_lines(f"{key}.held_out", entry.held_out)
    intent = Intent(entry.name, entry.action, fixed, entry.answer, templates)
    return intent, [parse_intent_line(line, action, fixed, place) for line, place in tested]


def _check_placeholders(sentence: str, known: Container[str], where: str) -> None:
    for name in _PLACEHOLDER.findall(sentence):
        if name not in known:
            raise ExportError(f"{where}: {{{name}}} is neither a state value nor a slot that is known here")


def _read_replies(folder: Path) -> tuple[Reply, ...]:
    replies: list[Reply] = []
    for path in sorted((folder / "replies").glob("*.toml")):
        toml = LocatedToml(path)
        for index, entry in enumerate(toml.convert(RepliesFile).reply):
            key = f"reply[{index}]"
            if any(entry.name == other.name for other in replies):
                raise ExportError(f"{toml.where(f'{key}.name')}: there are two replies {entry.name!r}")
            # Its sentence streams while it is written: a value that is missing would be noticed too late.
            _check_placeholders(entry.answer, {}, toml.where(f"{key}.answer"))
            templates = tuple(_reply_lines(toml, f"{key}.utterances", entry.utterances))
            if not templates:
                raise ExportError(f"{toml.where(f'{key}.utterances')}: reply {entry.name!r} has no utterance")
            tested = tuple(_reply_lines(toml, f"{key}.held_out", entry.held_out))
            replies.append(Reply(entry.name, entry.kind, entry.answer, templates, tested))
    return tuple(replies)


@dataclass(frozen=True)
class _Tested:
    """The lines of held_out/ or blind/: commands, and by the name of their reply the others, with where it is named."""

    commands: list[Template]
    replies: dict[str, tuple[str, list[Template]]]


def _read_tested(folder: Path, schema: DomainSchema) -> _Tested:
    tested = _Tested([], {})
    for path in sorted(folder.glob("*.toml")):
        toml = LocatedToml(path)
        content = toml.convert(TestedFile)
        for index, block in enumerate(content.mixed):
            lines = toml.text_lines(f"mixed[{index}].held_out", block.held_out)
            tested.commands.extend(parse_mixed_line(line, schema, where) for line, where in lines)
        for index, block in enumerate(content.reply):
            key = f"reply[{index}]"
            _, found = tested.replies.setdefault(block.name, (toml.where(f"{key}.name"), []))
            found.extend(_reply_lines(toml, f"{key}.held_out", block.held_out))
    return tested


def _with_tested(replies: tuple[Reply, ...], tested: _Tested, blind: _Tested) -> tuple[Reply, ...]:
    for name, (where, _) in (*tested.replies.items(), *blind.replies.items()):
        if not any(reply.name == name for reply in replies):
            raise ExportError(f"{where}: there is no reply {name!r} in replies/")

    def lines(found: _Tested, name: str) -> list[Template]:
        return found.replies[name][1] if name in found.replies else []

    return tuple(
        replace(
            reply,
            held_out=(*reply.held_out, *lines(tested, reply.name)),
            blind=tuple(lines(blind, reply.name)),
        )
        for reply in replies
    )


def _reply_lines(toml: LocatedToml, key: str, text: str) -> Iterator[Template]:
    for line, where in toml.text_lines(key, text):
        yield parse_reply_line(line, where)
