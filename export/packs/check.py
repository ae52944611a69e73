"""What only a whole pack can tell of a line: whether its slots can be said, and whether there is an answer to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge_llm.domain.schema import ChoiceSlot
from export.errors import ExportError
from export.packs.lines import Call, SlotPart

if TYPE_CHECKING:
    from export.packs.lines import Template
    from export.packs.pack import Pack


def check_templates(pack: Pack) -> None:
    """Check the lines of all commands. Raises ``ExportError`` with file and line."""
    trained = [template for intent in pack.intents for template in intent.templates]
    for template in (*trained, *pack.mixed, *pack.held_out, *pack.blind):
        _check_spoken(pack, template)
        for index, call in enumerate(template.calls):
            # What the tool will choose is in the answer, but no intent may count on its value.
            chosen = dict.fromkeys(_open_slots(template, index), "")
            if not pack.answering(Call(call.action, {**call.slots, **chosen})):
                given = ", ".join([*call.slots, *chosen]) or "no slot"
                raise ExportError(
                    f"{template.where}: no intent of {call.action} has an answer that fits these slots ({given}): "
                    f"write one, or leave out what its answer names"
                )


def _check_spoken(pack: Pack, template: Template) -> None:
    for index, call in enumerate(template.calls):
        for name in _open_slots(template, index):
            slot = pack.action(call.action).slots[name]
            if isinstance(slot, ChoiceSlot) and not any(pack.words[call.action, name].spoken.values()):
                raise ExportError(f"{template.where}: {{{name}}} cannot be said: no value of it has `spoken` words")


def _open_slots(template: Template, index: int) -> list[str]:
    return [p.slot for p in template.parts if isinstance(p, SlotPart) and p.words is None and p.call == index]
