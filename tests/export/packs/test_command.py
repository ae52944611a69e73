"""``python -m export pack``."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from export.cli import main
from tests.export.packs.small_pack import line_of


def test_a_valid_pack_is_shown(pack_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", str(pack_folder)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("kitchen 3 (Apache-2.0): 6 actions, no error\n")
    rows = dict(re.findall(r"^(\S.*?)  +(\d+ +\d+ +\d+)$", shown, re.MULTILINE))
    assert {name: tuple(map(int, counts.split())) for name, counts in rows.items()} == {
        "light.set": (4, 1, 0),
        "oven.heat": (3, 1, 0),
        "radio.tune": (1, 0, 0),
        "volume": (3, 0, 0),
        "call": (3, 2, 0),
        "status.humidity": (1, 1, 0),
        "several actions": (2, 1, 1),
        "fact": (1, 1, 2),
        "chat": (1, 0, 0),
        "refusal": (2, 1, 0),
        "all": (21, 8, 3),
    }
    assert len(shown.split("10 examples of seed 0:\n")[1].splitlines()) == 20


def test_examples_are_drawn_as_asked(pack_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for seed in ("3", "3", "4"):
        assert main(["pack", str(pack_folder), "--examples", "200", "--seed", seed]) == 0
        shown.append(capsys.readouterr().out.split("examples of seed ")[1])
    assert shown[0] == shown[1] != shown[2]
    lines = shown[0].splitlines()[1:]
    assert len(lines) == 400
    answers = [line for line in lines if line.startswith("      ")]
    assert len(answers) == 200
    assert any(re.match(r" +oven\.heat degrees=(\d+): Heating to \1 degrees\.$", line) for line in answers)
    assert any(line.strip() == "refusal: I only look after the kitchen." for line in answers)
    assert any(line.strip() == "status.humidity: It is {humidity} percent." for line in answers)


def test_an_error_is_one_line_with_file_and_line(pack_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = pack_folder / "replies" / "words.toml"
    path.write_text(path.read_text().replace("do my homework", "who won the match?"))
    assert main(["pack", str(pack_folder)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"export: {path}:{line_of(path, 'who won the match?')}: the held-out line ")
    assert captured.err.count("\n") == 1


def test_a_missing_pack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", str(tmp_path / "nowhere")]) == 2
    assert "is not a domain pack" in capsys.readouterr().err
