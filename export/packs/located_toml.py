"""TOML files whose errors name the line: the parser tells where its own errors are, and nothing about the rest."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec

from export.errors import ExportError

if TYPE_CHECKING:
    from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_Struct = TypeVar("_Struct", bound=msgspec.Struct)
_HEADER: Final = re.compile(r"\s*(\[\[?)\s*([^\[\]]+?)\s*\]\]?\s*(?:#.*)?$")
_KEY: Final = re.compile(r"\s*([A-Za-z0-9_.\"-]+)\s*=\s*(.*)$")
_QUOTES: Final = ("'''", '"""')


class LocatedToml:
    """A parsed TOML file that knows the line of its keys.

    Args:
        path: of the file.

    Raises:
        ExportError: it cannot be read, or is not TOML.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._text = path.read_text(encoding="utf-8")
            self._table: dict[str, Any] = tomllib.loads(self._text)
        except OSError as error:
            raise ExportError(f"cannot read {path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ExportError(f"{path} is not UTF-8 text") from None
        except tomllib.TOMLDecodeError as error:
            line = re.search(r"line (\d+)", str(error))
            # Without a number it is "at end of document".
            number = line[1] if line else len(self._text.splitlines())
            raise ExportError(f"{path}:{number}: not valid TOML: {error}") from None
        self._lines = _key_lines(self._text)

    def convert(self, kind: type[_Struct]) -> _Struct:
        """The contents as a strict struct. Raises ``ExportError`` with the line of what is wrong."""
        try:
            return msgspec.convert(self._table, kind)
        except msgspec.ValidationError as error:
            # "… - at `$.a[2].b`", or of a key itself "… - at `key` in `$.a`"
            message, _, place = str(error).partition(" - at `")
            key = place.removeprefix("key` in `").strip("`$.")
            raise ExportError(f"{self.where(key)}: {message}" + (f" (at {key})" if key else "")) from None

    def line(self, key: str) -> int:
        """The line of a key such as ``intent[2].answer``, or of the nearest table around it."""
        while key:
            if key in self._lines:
                return self._lines[key]
            key = re.sub(r"(\.[^.\[\]]+|\[[^\[\]]*\]|^[^.\[\]]+)$", "", key)
        return 1

    def where(self, key: str) -> str:
        """``file:line`` of a key."""
        return f"{self.path}:{self.line(key)}"

    def text_lines(self, key: str, text: str) -> list[tuple[str, str]]:
        """The lines of a multi-line string that are neither empty nor comments, each with its ``file:line``."""
        first = self.line(key)
        opening = self._text.splitlines()[first - 1]
        # TOML drops the line break right after the opening quotes.
        offset = 1 if opening.endswith(_QUOTES) and _opened(opening) else 0
        lines = enumerate(text.splitlines(), first + offset)
        said = [(line.strip(), f"{self.path}:{number}") for number, line in lines]
        return [(line, where) for line, where in said if line and not line.startswith("#")]


def _key_lines(text: str) -> dict[str, int]:
    lines: dict[str, int] = {}
    counts: dict[str, int] = {}
    table, closing = "", ""
    for number, line in enumerate(text.splitlines(), 1):
        if closing:
            closing = "" if closing in line else closing
            continue
        if header := _HEADER.match(line):
            table = _table_key(header[2].replace('"', ""), is_array=header[1] == "[[", counts=counts)
            lines.setdefault(table, number)
        elif key := _KEY.match(line):
            name = key[1].replace('"', "")
            lines.setdefault(f"{table}.{name}" if table else name, number)
            closing = _opened(key[2])
    return lines


def _opened(line: str) -> str:
    """The quotes of a multi-line string that begins in a line and does not end there."""
    return next((quotes for quotes in _QUOTES if line.count(quotes) == 1), "")


def _table_key(name: str, *, is_array: bool, counts: dict[str, int]) -> str:
    """``intent`` of ``[[intent]]`` as ``intent[2]``, ``action.slots`` of its third action as ``action[2].slots``."""
    head, dot, rest = name.partition(".")
    if is_array and not dot:
        counts[name] = counts.get(name, -1) + 1
        return f"{name}[{counts[name]}]"
    return f"{head}[{counts[head]}].{rest}" if head in counts and dot else name
