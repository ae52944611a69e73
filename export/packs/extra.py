"""More utterances for a pack, from a file of their own: what ``edge-llm feedback export`` wrote and a person reviewed.

::

    [[mixed]]
    utterances = '''
    open the boot | trunk.open
    '''
    [[same_as]]
    reply = "weather"
    utterances = '''
    is it going to be wet
    '''
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from export.errors import ExportError
from export.packs.check import check_templates
from export.packs.lines import parse_mixed_line, parse_reply_line
from export.packs.located_toml import LocatedToml

if TYPE_CHECKING:
    from pathlib import Path

    from export.packs.pack import Pack


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Frozen, and an unknown key is an error."""


class _Mixed(_Strict, frozen=True, kw_only=True):
    name: str = ""
    utterances: str


class _SameAs(_Strict, frozen=True, kw_only=True):
    reply: str
    utterances: str


class _ExtraFile(_Strict, frozen=True, kw_only=True):
    mixed: tuple[_Mixed, ...] = ()
    same_as: tuple[_SameAs, ...] = ()


def add_extra(pack: Pack, path: Path) -> Pack:
    """The pack with the utterances of ``path``. Raises ``ExportError`` with file and line."""
    toml = LocatedToml(path)
    content = toml.convert(_ExtraFile)
    mixed = list(pack.mixed)
    for index, block in enumerate(content.mixed):
        lines = toml.text_lines(f"mixed[{index}].utterances", block.utterances)
        mixed += [parse_mixed_line(line, pack.schema, where) for line, where in lines]
    replies = {reply.name: reply for reply in pack.replies}
    for index, same in enumerate(content.same_as):
        if same.reply not in replies:
            raise ExportError(f"{toml.where(f'same_as[{index}].reply')}: the pack has no reply {same.reply!r}")
        lines = toml.text_lines(f"same_as[{index}].utterances", same.utterances)
        more = tuple(parse_reply_line(line, where) for line, where in lines)
        known = replies[same.reply]
        replies[same.reply] = replace(known, templates=(*known.templates, *more))
    extended = replace(pack, mixed=tuple(mixed), replies=tuple(replies.values()))
    check_templates(extended)
    return extended
