"""``python -m export pack``: whether a pack is right, how much it holds, and what its examples look like."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from edge_llm.arguments import positive_int
from edge_llm.domain.schema import spoken
from export.packs.examples import ExampleMaker
from export.packs.pack import load_pack
from export.packs.wording import check_wordings, distinct_wordings, held_out_wordings

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from edge_llm.arguments import OneLineParser
    from export.packs.examples import Example
    from export.packs.lines import Call
    from export.packs.pack import Pack


def add_pack_parser(commands: argparse._SubParsersAction[OneLineParser]) -> None:
    """Add the command to ``python -m export``."""
    parser = commands.add_parser("pack", help="check a domain pack, and show what it holds")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a domain pack")
    parser.add_argument("--examples", type=positive_int, default=10, metavar="N", help="to draw (default 10)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the examples (default 0)")


def run_pack(arguments: argparse.Namespace) -> None:
    """Check and print. Raises ``ExportError`` with the file and line of what is wrong."""
    pack = load_pack(arguments.folder)
    check_wordings(pack)
    schema = pack.schema
    print(f"{schema.name} {schema.version} ({pack.license}): {len(schema.actions)} actions, no error\n")
    for line in _table(pack):
        print(line)
    print(f"\n{arguments.examples} examples of seed {arguments.seed}:")
    for example in itertools.islice(iter(ExampleMaker(pack, arguments.seed)), arguments.examples):
        calls = "; ".join(_written(pack, call) for call in example.calls) or example.kind
        print(f"  {example.text}\n      {calls}: {_said(pack, example)}")


def _table(pack: Pack) -> Iterator[str]:
    """Wordings by action and kind: trained on, held out and blind."""
    trained, tested, blind = distinct_wordings(pack), held_out_wordings(pack), held_out_wordings(pack.judged_blind())
    names = list(dict.fromkeys([*trained, *tested, *blind]))
    width = max(map(len, [*names, "distinct wordings"]))
    yield f"{'distinct wordings':<{width}}  trained  held out  blind"
    for name in names:
        yield f"{name:<{width}}  {trained.get(name, 0):>7}  {tested.get(name, 0):>8}  {blind.get(name, 0):>5}"
    yield f"{'all':<{width}}  {sum(trained.values()):>7}  {sum(tested.values()):>8}  {sum(blind.values()):>5}"


def _written(pack: Pack, call: Call) -> str:
    """An action as a line of the pack names it."""
    slots = ((name, call.slots[name]) for name in pack.action(call.action).slots if name in call.slots)
    return " ".join([call.action, *(f'{name}="{v}"' if " " in str(v) else f"{name}={v}" for name, v in slots)])


def _said(pack: Pack, example: Example) -> str:
    """The answer with its slots; what the host publishes stays in braces."""
    said = list(example.answers)
    for index, call in enumerate(example.calls):
        for name, value in call.slots.items():
            said[index] = said[index].replace("{" + name + "}", spoken(pack.action(call.action).slots[name], value))
    return " ".join(said)
