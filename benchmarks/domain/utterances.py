"""What is asked, and what should come out: the pack's held-out lines, or a file of JSON lines."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from edge_llm.errors import EdgeLlmError
from export.packs.examples import Example, held_out_examples
from export.packs.pack import load_pack


class WantedAction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An action that should come out."""

    name: str
    slots: dict[str, int | float | str] = {}


class Utterance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of FILE. ``kind`` chat is small talk, which the pack has too."""

    text: str
    kind: Literal["command", "fact", "outside", "chat"]
    actions: tuple[WantedAction, ...] = ()
    answer_keywords: tuple[str, ...] = ()


def read_utterances(path: Path) -> list[Utterance]:
    """Read FILE. Raises ``EdgeLlmError`` naming the line that is wrong."""
    utterances = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                utterances.append(msgspec.json.decode(line, type=Utterance))
            except msgspec.MsgspecError as error:
                raise EdgeLlmError(f"{path}:{number}: {error}") from None
    return utterances


def pack_utterances(folder: Path, *, blind: bool = False) -> list[Utterance]:
    """The held-out or the blind lines of a pack; the whole answer is their keyword, where it holds no placeholder.

    Raises:
        EdgeLlmError: the pack has no such line.
    """
    pack = load_pack(folder)
    examples = held_out_examples(pack.judged_blind() if blind else pack)
    if not examples:
        raise EdgeLlmError(f"{folder} has no {'blind' if blind else 'held-out'} lines (docs/domain-packs.md)")
    return [_as_utterance(example) for example in examples]


def _as_utterance(example: Example) -> Utterance:
    kind = "outside" if example.kind == "refusal" else example.kind
    actions = tuple(WantedAction(call.action, dict(call.slots)) for call in example.calls)
    keywords = tuple(answer for answer in example.answers if "{" not in answer)
    return Utterance(example.text, kind, actions, keywords)
