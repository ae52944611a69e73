"""When two lines are worded the same: after masking slots, numbers, case, punctuation and fillers.

Lines that are the same teach nothing new, and a held-out line that is worded like a training line tests nothing.
"""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING, Final, TypeAlias

from edge_llm.domain.schema import ChoiceSlot, TextSlot
from export.errors import ExportError
from export.packs.numbers import mask_numbers

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from edge_llm.domain.schema import SlotValue
    from export.packs.lines import Part, Template
    from export.packs.pack import Pack

# The name of a reply, or actions with the values that are known.
_Meaning: TypeAlias = "str | tuple[tuple[str, Mapping[str, SlotValue]], ...]"
SEVERAL: Final = "several actions"
_NOT_WORDS: Final = re.compile(r"[^\w@#']+")
_MAX_VARIANTS: Final = 64


class Wordings:
    """Compares the lines of one pack.

    Args:
        pack: its slots tell how values are said, its fillers what does not count.
    """

    def __init__(self, pack: Pack) -> None:
        self._pack = pack
        # Longest first: "can you" before "can".
        fillers = sorted({_plain(filler) for filler in (*pack.fillers_before, *pack.fillers_after)}, key=len)[::-1]
        either = "|".join(map(re.escape, filter(None, fillers))) or "(?!)"
        self._around = re.compile(rf"^(?:(?:{either}) )+|(?: (?:{either}))+$")

    def of(self, template: Template) -> set[str]:
        """Every masked form that a line can have: one, but for choices, which are said in several ways."""
        ways = [self._ways(part, template) for part in template.parts]
        forms = itertools.islice(itertools.product(*ways), _MAX_VARIANTS)
        return {self.masked("".join(form)) for form in forms}

    def _ways(self, part: Part, template: Template) -> Sequence[str]:
        if isinstance(part, str):
            return (part,)
        action = self._pack.action(template.calls[part.call].action)
        slot = action.slots[part.slot]
        if isinstance(slot, TextSlot):
            return ("@",)
        if part.words is not None:
            return (part.words,)
        if isinstance(slot, ChoiceSlot):
            spoken = self._pack.words[action.name, part.slot].spoken
            return [words for every in spoken.values() for words in every]
        return ("#",)

    def masked(self, text: str) -> str:
        """Plain words without numbers, case, punctuation and fillers."""
        plain = mask_numbers(_plain(text))
        without = self._around.sub("", plain)
        return without or plain


def check_wordings(pack: Pack) -> None:
    """Check that no wording means two things, and that no held-out line is a training line.

    Raises:
        ExportError: with the file and line of both.
    """
    wordings = Wordings(pack)
    seen: dict[str, tuple[Template, _Meaning]] = {}
    for template, meaning in _trained(pack):
        for form in wordings.of(template):
            known = seen.setdefault(form, (template, meaning))
            if not _agree(known[1], meaning, has_number="#" in form):
                raise ExportError(
                    f"{template.where}: {template.text!r} is worded as {known[0].where}, which means something else: "
                    f"reword one, or remove it"
                )
    for template in _tested(pack):
        for form in wordings.of(template):
            if form in seen:
                raise ExportError(
                    f"{template.where}: the held-out line {template.text!r} is worded as {seen[form][0].where}, which "
                    f"is trained on: reword it, or remove it"
                )


def held_out_forms(pack: Pack) -> set[str]:
    """Every masked form of the lines that are only tested on."""
    wordings = Wordings(pack)
    return {form for template in _tested(pack) for form in (*wordings.of(template), wordings.masked(template.text))}


def distinct_wordings(pack: Pack) -> dict[str, int]:
    """How many different wordings each action, ``SEVERAL`` actions at once, and each kind of reply has."""
    commands = [template for intent in pack.intents for template in intent.templates]
    return _count(
        pack, [*commands, *pack.mixed], [(r.kind, template) for r in pack.replies for template in r.templates]
    )


def held_out_wordings(pack: Pack) -> dict[str, int]:
    """The same of the held-out lines."""
    return _count(pack, pack.held_out, [(r.kind, template) for r in pack.replies for template in r.held_out])


def _count(pack: Pack, commands: Iterable[Template], replies: Iterable[tuple[str, Template]]) -> dict[str, int]:
    wordings = Wordings(pack)
    forms: dict[str, set[str]] = {action.name: set() for action in pack.schema.actions}
    named = [(t.calls[0].action if len(t.calls) == 1 else SEVERAL, t) for t in commands]
    for name, template in (*named, *replies):
        forms.setdefault(name, set()).add(min(wordings.of(template)))
    return {name: len(found) for name, found in forms.items()}


def _trained(pack: Pack) -> list[tuple[Template, _Meaning]]:
    commands = [template for intent in pack.intents for template in intent.templates] + list(pack.mixed)
    meant: list[tuple[Template, _Meaning]] = [(template, _meaning(pack, template)) for template in commands]
    return meant + [(template, reply.name) for reply in pack.replies for template in reply.templates]


def _tested(pack: Pack) -> list[Template]:
    replies = (template for reply in pack.replies for template in (*reply.held_out, *reply.blind))
    return [*pack.held_out, *pack.blind, *replies]


def _meaning(pack: Pack, template: Template) -> _Meaning:
    """The actions with the values that the words fix; text is masked, and what the tool fills in is not known."""
    return tuple(
        (
            call.action,
            {
                name: value
                for name, value in call.slots.items()
                if not isinstance(pack.action(call.action).slots[name], TextSlot)
            },
        )
        for call in template.calls
    )


def _agree(known: _Meaning, meaning: _Meaning, *, has_number: bool) -> bool:
    """Whether two meanings of the same words can both be right: a number that is said is masked, so it may differ."""
    if isinstance(known, str) or isinstance(meaning, str):
        return known == meaning
    if [action for action, _ in known] != [action for action, _ in meaning]:
        return False
    return all(
        ours[name] == theirs[name] or (has_number and not isinstance(ours[name], str))
        for (_, ours), (_, theirs) in zip(known, meaning, strict=True)
        for name in ours.keys() & theirs.keys()
    )


def _plain(text: str) -> str:
    return _NOT_WORDS.sub(" ", text.lower()).strip()
