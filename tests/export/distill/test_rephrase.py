"""More wordings from a teacher that is played: what it writes and what it understands is said by the test."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edge_llm.engine.tokenizer import Tokenizer
from export.distill import rephrase as rephrase_module
from export.distill.rephrase import read_rephrased, rephrase
from export.errors import ExportError
from export.packs.encode import ExampleEncoder
from export.packs.examples import Example
from export.packs.lines import Call, SlotPart
from export.packs.pack import Pack, load_pack
from tests.export.packs.small_pack import tokenizer_for, write_pack

EGG = Example("how long does an egg take", "fact", (), ("Eight minutes.",), "egg")
CALL = Example("call Ana", "command", (Call("call", {"contact": "Ana"}),), ("Calling {contact}.",), "call")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rephrase_module, "_BATCH_ROWS", 2)


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return load_pack(write_pack(tmp_path_factory.mktemp("packs") / "kitchen"))


@pytest.fixture(scope="module")
def tokenizer(kitchen: Pack) -> Tokenizer:
    return tokenizer_for(kitchen.schema)


class PowerCutError(Exception):
    pass


class PlayedTeacher:
    """Writes utterances in turn and understands all but those with ``wrong`` in them; ``…`` never ends."""

    def __init__(self, tokenizer: Tokenizer, utterances: Sequence[str], fail_after: int = 10**9) -> None:
        self._tokenizer = tokenizer
        self._utterances: Iterator[str] = itertools.cycle(utterances)
        self._fail_after = fail_after
        self.batches = 0

    def eval(self) -> None: ...

    def generate(self, prompts: Any, **options: Any) -> Any:
        import torch

        if self.batches == self._fail_after:
            raise PowerCutError
        self.batches += 1
        end_id = options["eos_token_id"]
        rows = []
        for prompt in prompts.tolist():
            text = next(self._utterances)
            rows.append([*prompt, *self._tokenizer.encode(text.rstrip("…")), *([] if text.endswith("…") else [end_id])])
        width = max(map(len, rows))
        # Padding is the end; a text without one fills the row.
        return torch.tensor([row + [end_id if row[-1] == end_id else row[-1]] * (width - len(row)) for row in rows])

    def __call__(self, input_ids: Any) -> Any:
        import torch

        logits = torch.zeros(*input_ids.shape, self._tokenizer.vocab_size)
        logits.scatter_(2, input_ids.roll(-1, dims=1)[..., None], 9.0)
        for row, token_ids in enumerate(input_ids.tolist()):
            if "wrong" in self._tokenizer.decode(token_ids):
                logits[row] = 0
        return SimpleNamespace(logits=logits)


def ask(
    teacher: PlayedTeacher, pack: Pack, tokenizer: Tokenizer, meaning: Example, count: int, folder: Path
) -> list[str]:
    """Rephrases one meaning again and again; returns the texts that are kept."""
    path = folder / "rephrased.jsonl"
    rephrase(teacher, pack, ExampleEncoder(pack.schema, tokenizer), itertools.repeat(meaning), count, path)
    return [found.template.text for found in read_rephrased(path, pack)]


def test_what_the_teacher_understands_is_kept_once(kitchen: Pack, tokenizer: Tokenizer, tmp_path: Path) -> None:
    utterances = [
        "time for a boiled egg?",
        "a wrong question",
        "Time for a boiled egg, please",
        "minutes for one egg",
        "when is an egg hard",  # held out
        "the egg and then…",
        "x",
        "eggs\x07",
    ]
    kept = ask(PlayedTeacher(tokenizer, utterances), kitchen, tokenizer, EGG, 8, tmp_path)
    assert kept == ["time for a boiled egg?", "minutes for one egg"]
    found = read_rephrased(tmp_path / "rephrased.jsonl", kitchen)
    assert {(one.kind, one.answers) for one in found} == {("fact", ("Eight minutes.",))}


def test_words_of_a_text_slot_stay_to_be_copied(kitchen: Pack, tokenizer: Tokenizer, tmp_path: Path) -> None:
    utterances = [
        "give ANA a bell",
        "give him a bell",  # says nobody
        "phone Ana, would you",  # held out
        "Ana on the line, now",
        "Give Ana a bell!",
    ]
    kept = ask(PlayedTeacher(tokenizer, utterances), kitchen, tokenizer, CALL, 6, tmp_path)
    assert kept == ["give ANA a bell", "Ana on the line, now"]
    first, _ = read_rephrased(tmp_path / "rephrased.jsonl", kitchen)
    assert first.template.parts == ("give ", SlotPart("contact", "ANA"), " a bell")
    assert first.template.calls == CALL.calls


def test_a_run_that_was_cut_off_goes_on_and_keeps_nothing_twice(
    kitchen: Pack, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    utterances = ["an egg of mine", "an egg of yours", "an egg of hers", "an egg of ours"]
    with pytest.raises(PowerCutError):
        ask(PlayedTeacher(tokenizer, utterances, fail_after=1), kitchen, tokenizer, EGG, 6, tmp_path)
    teacher = PlayedTeacher(tokenizer, utterances)
    kept = ask(teacher, kitchen, tokenizer, EGG, 6, tmp_path)
    assert kept == utterances
    assert teacher.batches == 2
    again = PlayedTeacher(tokenizer, utterances)
    assert ask(again, kitchen, tokenizer, EGG, 6, tmp_path) == utterances
    assert again.batches == 0


def test_a_teacher_that_understands_nothing_is_reported(kitchen: Pack, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"found no words that it understands .*: fine-tune it for longer"):
        ask(PlayedTeacher(tokenizer, ["wrong"]), kitchen, tokenizer, EGG, 4, tmp_path)
