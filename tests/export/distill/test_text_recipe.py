"""``python -m export distill --text``: a tiny teacher, a text, a student that writes like it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_llm.bundle.manifest import Bundle
from export.cli import main
from export.distill.compare import compare_with_and_without
from export.distill.text_recipe import split_text
from export.errors import ExportError

Command = Callable[..., int]
LINE = "The quick brown fox jumps over the lazy dog, and number {} is next.\n"


@pytest.fixture
def distill(gpt2_folder: Path, tmp_path: Path) -> Command:
    text = tmp_path / "text.txt"
    text.write_text("".join(LINE.format(number) for number in range(120)))

    def run(*flags: str, out: str = "bundle") -> int:
        paths = {"--text": text, "--teacher": gpt2_folder, "--out": tmp_path / out, "--work": tmp_path / "work"}
        given = [part for flag, path in paths.items() for part in (flag, str(path))]
        small = ["--student", "2x32", "--context", "48", "--steps", "30", "--batch-tokens", "256"]
        return main(["distill", *given, *small, *flags])

    return run


def quality(folder: Path) -> dict:
    return json.loads((Bundle.open(folder).path / "quality.json").read_text())


def test_a_text_becomes_a_bundle_with_its_figures(distill, tmp_path):
    assert distill() == 0
    bundle = Bundle.open(tmp_path / "bundle")
    bundle.verify()
    assert bundle.manifest.model.num_layers == 2
    assert bundle.manifest.model.hidden_size == 32
    figures = quality(tmp_path / "bundle")["held_out_bits_per_byte"]
    assert figures["bytes"] > 200
    assert 0 < figures["student"] < figures["teacher"] * 2


def test_the_loss_falls(distill, tmp_path):
    assert distill("--steps", "80") == 0
    losses = [float(line.split(",")[1]) for line in (tmp_path / "work/student/loss.csv").read_text().splitlines()[1:]]
    assert losses[-1] < losses[0] * 0.8


def test_with_and_without_the_teacher(distill, tmp_path):
    assert distill("--compare-seeds", "2") == 0
    compared = quality(tmp_path / "bundle")["distilling"]
    assert [row["seed"] for row in compared["held_out_bits_per_byte"]] == [0, 1]
    assert {path.name for path in (tmp_path / "work/compare").iterdir()} == {
        "distilled-0",
        "distilled-1",
        "cross_entropy-0",
        "cross_entropy-1",
    }


def test_a_smaller_vocabulary(distill, tmp_path):
    assert distill("--vocabulary", "300") == 0
    assert Bundle.open(tmp_path / "bundle").manifest.model.vocab_size <= 300


def test_the_same_command_goes_on_where_it_was(distill, tmp_path, capfd):
    assert distill("--steps", "20") == 0
    capfd.readouterr()
    assert distill("--steps", "40", out="second") == 0
    said = capfd.readouterr()
    assert "steps 20 to 40 of 40" in said.out + said.err
    assert "asking the teacher" not in said.out + said.err


def test_hidden_states_need_the_teachers_width(distill, tmp_path, capfd, gpt2_folder):
    width = json.loads((gpt2_folder / "config.json").read_text())["n_embd"]
    assert distill("--student", f"1x{width}", "--hidden-weight", "1", "--steps", "10") == 0
    assert distill("--student", "1x16", "--hidden-weight", "1", out="other") == 2
    assert f"must be as wide as the teacher: {width}" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rephrase", "5"], "go with --pack"),
        (["--context", "100000"], "the teacher takes at most"),
    ],
)
def test_what_does_not_go_together_is_said(distill, capfd, flags, message):
    assert distill(*flags) == 2
    assert message in capfd.readouterr().err


def test_a_text_and_a_pack_exclude_each_other(distill, capfd):
    with pytest.raises(SystemExit):
        distill("--pack", "examples/vehicle")
    assert "not allowed with argument" in capfd.readouterr().err


@pytest.mark.parametrize("text", ["", "too short\n", "one line without an end " * 50])
def test_a_text_that_leaves_nothing_to_judge_by(text):
    with pytest.raises(ExportError, match="--text is too short"):
        split_text(text)


def test_the_end_is_held_out_by_lines():
    text = "".join(LINE.format(number) for number in range(100))
    trained, held_out = split_text(text)
    assert trained + held_out == text
    assert trained.endswith("next.\n")
    assert 200 <= len(held_out) <= len(text) * 0.07


def test_a_comparison_that_distilling_loses_says_so(tmp_path):
    def train(seed: int, folder: Path, *, distilled: bool) -> float:
        return {(0, True): 1.0, (0, False): 1.2, (1, True): 1.3, (1, False): 1.1}[seed, distilled]

    compared = compare_with_and_without(train, tmp_path, range(2))
    assert compared["mean_distilled"] == 1.15
    assert compared["mean_cross_entropy"] == 1.15
    assert compared["wins_from_every_seed"] is False
