"""The lines that LocatedToml names."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from export.errors import ExportError
from export.packs.located_toml import LocatedToml

TEXT = """\
# A comment
title = "x"

[[entry]]
name = "first"
text = '''
one

# not one
two'''
"quoted" = 1
[entry.inner]
deep = { a = 1 }

[[entry]]   # the second
name = "second"
text = '''on its opening line
and below'''
single = '''all of it'''
plain = "also"
spaced = \"\"\"
  [[entry]]
  name = "only text"
\"\"\"
[[entry]]
name = "third"
[table]
key = 2
"""


@pytest.fixture
def toml(tmp_path: Path) -> LocatedToml:
    path = tmp_path / "a.toml"
    path.write_text(TEXT)
    return LocatedToml(path)


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("title", 2),
        ("entry[0]", 4),
        ("entry[0].name", 5),
        ("entry[0].text", 6),
        ("entry[0].quoted", 11),
        ("entry[0].inner", 12),
        ("entry[0].inner.deep", 13),
        ("entry[0].inner.deep.a", 13),
        ("entry[1]", 15),
        ("entry[1].text", 17),
        ("entry[1].plain", 20),
        ("entry[2]", 25),
        ("entry[2].name", 26),
        ("table.key", 28),
        ("entry[2].missing", 25),
        ("entry[2].missing[...].deeper", 25),
        ("entry[7].name", 1),
        ("", 1),
    ],
)
def test_a_key_has_its_line_or_that_of_the_table_around_it(key: str, line: int, toml: LocatedToml) -> None:
    assert toml.line(key) == line
    assert toml.where(key) == f"{toml.path}:{line}"


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("entry[0].text", "one\n\n# not one\ntwo", {"one": 7, "two": 10}),
        ("entry[1].text", "on its opening line\nand below", {"on its opening line": 17, "and below": 18}),
        ("entry[1].single", "all of it", {"all of it": 19}),
        ("entry[1].plain", "also", {"also": 20}),
        ("entry[1].spaced", '  [[entry]]\n  name = "only text"\n', {"[[entry]]": 22, 'name = "only text"': 23}),
    ],
)
def test_lines_of_a_text_are_counted_from_where_it_begins(
    key: str, text: str, expected: dict[str, int], toml: LocatedToml
) -> None:
    assert toml.text_lines(key, text) == [(line, f"{toml.path}:{number}") for line, number in expected.items()]


class Inner(msgspec.Struct, forbid_unknown_fields=True):
    deep: dict[str, int]


class Entry(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    text: str = ""
    inner: Inner | None = None


class File(msgspec.Struct, forbid_unknown_fields=True):
    entry: list[Entry]
    words: dict[str, int] = {}


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("[[entry]]\nname = 'a'\n\n[[entry]]\nname = 3\n", 5, "Expected `str`, got `int` (at entry[1].name)"),
        (
            "[[entry]]\nname = 'a'\n[entry.inner]\ndeep = 3\n",
            4,
            "Expected `object`, got `int` (at entry[0].inner.deep)",
        ),
        ("words = { a = 'x' }\nentry = []\n", 1, "(at words[...])"),
        ("entry = []\n[words]\na = 'x'\n", 2, "Expected `int`, got `str`"),
        ("\n\nentry = 3\n", 3, "Expected `array`, got `int` (at entry)"),
        ("[[entry]]\n[[entry]]\nname = 'a'\n", 1, "missing required field `name` (at entry[0])"),
        ("title = 1\n", 1, "unknown field `title`"),
    ],
)
def test_what_does_not_fit_is_named_with_its_line(text: str, line: int, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(text)
    with pytest.raises(ExportError) as caught:
        LocatedToml(path).convert(File)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line"), [("a = 1\nb = \n", 2), ("a = '''\n\nx\n", 3), ("[a\n", 1), ("a = 1\n\na = 2\n", 3)]
)
def test_what_is_no_toml_is_named_with_its_line(text: str, line: int, tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(text)
    with pytest.raises(ExportError, match=f"{path}:{line}: not valid TOML"):
        LocatedToml(path)
