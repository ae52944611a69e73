"""The training loop on a model of a few thousand weights."""

from __future__ import annotations

import csv
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.distill import train as train_module
from export.distill.corpus import Corpus
from export.distill.losses import LossWeights
from export.distill.student import StudentShape, new_student
from export.distill.teacher import CacheKey, TeacherCache
from export.distill.train import Trainer, TrainSettings, schedule
from export.errors import ExportError
from tests.export.distill.tiny_corpus import VOCAB, make_corpus

SETTINGS = TrainSettings(steps=60, batch_tokens=160, learning_rate=5e-3, checkpoint_s=1e9)


def student(layers: int = 1, dropout: float = 0.1) -> Any:
    return new_student(StudentShape(layers, 32), VOCAB, 24, dropout, 0)


def train(folder: Path, corpus: Corpus, settings: TrainSettings = SETTINGS, until: int | None = None) -> Trainer:
    trainer = Trainer(student(), corpus, settings, folder)
    trainer.run(until=until)
    return trainer


def assert_equal_weights(one: Any, other: Any) -> None:
    for (name, a), (_, b) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert bool((a == b).all()), name


def test_the_loss_falls(corpus: Corpus, tmp_path: Path) -> None:
    trainer = train(tmp_path, corpus)
    assert trainer.step == 60
    assert len(trainer.losses) == 3
    assert trainer.losses[0] > trainer.losses[1] > trainer.losses[2]
    assert trainer.losses[0] < np.log(VOCAB) + 0.5


def test_the_curve_is_written_down(corpus: Corpus, tmp_path: Path) -> None:
    trainer = train(tmp_path, corpus, replace(SETTINGS, steps=50))
    with (tmp_path / "loss.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row["step"]) for row in rows] == [20, 40, 50]
    assert [float(row["loss"]) for row in rows] == trainer.losses
    assert all(float(row["tokens_per_s"]) > 0 for row in rows)
    assert float(rows[-1]["learning_rate"]) == pytest.approx(SETTINGS.learning_rate * 0.1, rel=0.05)


def test_the_curve_is_drawn(corpus: Corpus, tmp_path: Path) -> None:
    train(tmp_path, corpus, replace(SETTINGS, steps=10))
    head = (tmp_path / "loss.png").read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", head[16:24]) == (960, 600)


def test_a_run_is_the_same_for_a_seed(corpus: Corpus, tmp_path: Path) -> None:
    first, second, other = (
        train(tmp_path / str(number), corpus, replace(SETTINGS, steps=20, seed=seed))
        for number, seed in enumerate((0, 0, 1))
    )
    assert first.losses == second.losses != other.losses
    assert_equal_weights(first.model, second.model)


@pytest.mark.parametrize("stops", [(20,), (7,), (13, 14, 41), (33, 33, 60)])
def test_a_resumed_run_is_the_uninterrupted_one(stops: tuple[int, ...], corpus: Corpus, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", corpus)
    for stop in stops:
        assert train(tmp_path / "cut", corpus, until=stop).step == stop
    resumed = train(tmp_path / "cut", corpus)
    assert resumed.step == 60
    assert resumed.losses == whole.losses
    assert_equal_weights(resumed.model, whole.model)
    assert_equal_weights(resumed.averaged(), whole.averaged())


class PowerCutError(Exception):
    pass


def test_a_run_that_was_cut_off_goes_on_from_its_last_checkpoint(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(tmp_path / "whole", corpus)
    often = replace(SETTINGS, checkpoint_s=-1.0)
    seen: list[int] = []

    def watch(step: int) -> None:
        seen.append(step)
        if step == 31:
            raise PowerCutError

    with pytest.raises(PowerCutError):
        Trainer(student(), corpus, often, tmp_path / "cut").run(watch=watch)
    assert seen == list(range(1, 32))
    resumed = Trainer(student(), corpus, often, tmp_path / "cut")
    assert resumed.step == 31
    resumed.run()
    assert resumed.losses == whole.losses
    assert_equal_weights(resumed.model, whole.model)


def test_a_finished_run_does_nothing_more(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = train(tmp_path, corpus)
    monkeypatch.setattr(train_module, "batch_loss", lambda *_: pytest.fail("trained again"))
    again = train(tmp_path, corpus)
    assert again.losses == done.losses
    assert_equal_weights(again.averaged(), done.averaged())


def test_a_longer_run_may_follow(corpus: Corpus, tmp_path: Path) -> None:
    train(tmp_path, corpus, replace(SETTINGS, steps=40))
    longer = train(tmp_path, corpus, replace(SETTINGS, steps=80, checkpoint_s=5.0))
    assert longer.step == 80
    assert len(longer.losses) == 4


def test_weights_are_averaged_from_the_middle_on(corpus: Corpus, tmp_path: Path) -> None:
    trainer = train(tmp_path, corpus, replace(SETTINGS, average_from=0.5))
    last = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    model = trainer.averaged()
    assert not model.training
    assert any(bool((last[name] != value).any()) for name, value in model.state_dict().items())
    assert model.lm_head.weight is model.transformer.wte.weight
    plain = train(tmp_path / "plain", corpus, replace(SETTINGS, average_from=1.0))
    last = {name: value.clone() for name, value in plain.model.state_dict().items()}
    assert all(bool((last[name] == value).all()) for name, value in plain.averaged().state_dict().items())


def test_a_student_follows_its_teacher(corpus: Corpus, tmp_path: Path) -> None:
    teacher = train(tmp_path / "teacher", corpus).averaged()
    key = CacheKey("teacher", corpus.digest, 8, 2.0)
    cache = TeacherCache(tmp_path, key, int(corpus.token_ids.size))
    cache.fill(teacher, corpus)
    settings = replace(SETTINGS, loss=LossWeights(cross_entropy=0.0, divergence=1.0))
    trainer = Trainer(student(), corpus, settings, tmp_path / "student", cache)
    trainer.run()
    assert trainer.losses[-1] < 0.7 * trainer.losses[0]
    with pytest.raises(ExportError, match="holds a run with another teacher"):
        Trainer(student(), corpus, settings, tmp_path / "student")


CHANGES: dict[str, TrainSettings] = {
    "learning_rate": replace(SETTINGS, learning_rate=1e-3),
    "matrix_learning_rate": replace(SETTINGS, matrix_learning_rate=2e-3),
    "batch_tokens": replace(SETTINGS, batch_tokens=99),
    "seed": replace(SETTINGS, seed=1),
    "weight_decay": replace(SETTINGS, weight_decay=0.0),
    "average_from": replace(SETTINGS, average_from=0.9),
    "loss": replace(SETTINGS, loss=LossWeights(prompt=0.5)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_of_other_settings_is_refused_by_name(name: str, corpus: Corpus, tmp_path: Path) -> None:
    train(tmp_path, corpus, until=1)
    with pytest.raises(ExportError, match=f"{tmp_path} holds a run with another {name}: give --work another folder"):
        Trainer(student(), corpus, CHANGES[name], tmp_path)


def test_a_run_on_another_corpus_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    train(tmp_path, corpus, until=1)
    with pytest.raises(ExportError, match="holds a run with another corpus"):
        Trainer(student(), make_corpus(seed=1), SETTINGS, tmp_path)


def test_a_run_of_another_model_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    Trainer(student(), corpus, SETTINGS, tmp_path, origin="GPT-2 of one layer").run(until=1)
    with pytest.raises(ExportError, match="holds a run with another model"):
        Trainer(student(), corpus, SETTINGS, tmp_path, origin="another")
    with pytest.raises(ExportError, match="a model of another shape"):
        Trainer(student(layers=2), corpus, SETTINGS, tmp_path, origin="GPT-2 of one layer")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-500])


def scribble(path: Path) -> None:
    path.write_bytes(b"not a checkpoint")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def other_contents(path: Path) -> None:
    import torch

    torch.save([1, 2], path)


@pytest.mark.parametrize("damage", [truncate, scribble, empty, other_contents])
def test_a_damaged_checkpoint_is_refused(damage: Callable[[Path], None], corpus: Corpus, tmp_path: Path) -> None:
    train(tmp_path, corpus, until=1)
    damage(tmp_path / "checkpoint.pt")
    with pytest.raises(ExportError, match=r"checkpoint\.pt is damaged: remove .* to begin anew"):
        Trainer(student(), corpus, SETTINGS, tmp_path)


def test_a_half_written_checkpoint_leaves_the_one_before(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    train(tmp_path, corpus, until=20)
    save = torch.save

    def cut_off(state: Any, path: Path) -> None:
        save(state, path)
        truncate(path)
        raise PowerCutError

    monkeypatch.setattr(torch, "save", cut_off)
    with pytest.raises(PowerCutError):
        train(tmp_path, corpus, until=40)
    monkeypatch.undo()
    assert Trainer(student(), corpus, SETTINGS, tmp_path).step == 20


def test_a_loss_that_is_no_number_ends_the_run(corpus: Corpus, tmp_path: Path) -> None:
    import torch

    model = student()
    with torch.no_grad():
        model.transformer.wte.weight[:] = float("nan")
    with pytest.raises(ExportError, match="the loss is nan at step 0: lower --learning-rate"):
        Trainer(model, corpus, SETTINGS, tmp_path).run()
    assert not (tmp_path / "checkpoint.pt").exists()


def test_the_learning_rate_rises_and_falls() -> None:
    settings = TrainSettings(steps=100, warmup_share=0.1)
    factors = [schedule(step, settings) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[10] == 1.0
    assert factors[-1] == pytest.approx(0.1, abs=0.01)
    assert schedule(500, settings) == pytest.approx(0.1)
    assert schedule(0, replace(settings, steps=1)) > 0
