"""Which optimiser moves which weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from export.distill.corpus import Corpus
from export.distill.optimizers import Optimizers
from export.distill.train import Trainer
from tests.export.distill.test_train import SETTINGS, assert_equal_weights, student, train

MUON = replace(SETTINGS, matrix_learning_rate=5e-3)


def moved(model: Any, learning_rate: float, matrix_learning_rate: float) -> set[str]:
    """The weights that one step changes."""
    import torch

    optimizers = Optimizers(model, learning_rate, matrix_learning_rate, weight_decay=0.0)
    before = {name: value.clone() for name, value in model.named_parameters()}
    for value in model.parameters():
        value.grad = torch.ones_like(value)
    optimizers.step(1.0)
    return {name for name, value in model.named_parameters() if bool((before[name] != value).any())}


def test_muon_has_the_matrices_of_the_layers_and_adamw_the_rest() -> None:
    everything = {name for name, _ in student().named_parameters()}
    matrices = {name for name, value in student().named_parameters() if value.dim() == 2 and ".h." in name}
    assert len(matrices) == 4
    assert moved(student(), 0.0, 1e-2) == matrices
    assert moved(student(), 1e-2, 0.0) == everything
    assert moved(student(), 1e-2, 1e-2) == everything


def test_the_factor_scales_every_step() -> None:
    assert moved(student(), 1e-2, 1e-2)
    model = student()
    optimizers = Optimizers(model, 1e-2, 1e-2, weight_decay=0.0)
    before = {name: value.clone() for name, value in model.named_parameters()}
    for value in model.parameters():
        value.grad = value.detach().clone()
    optimizers.step(0.0)
    assert all(bool((before[name] == value).all()) for name, value in model.named_parameters())
    assert all(value.grad is None for value in model.parameters())


def test_a_resumed_run_with_muon_is_the_uninterrupted_one(corpus: Corpus, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", corpus, MUON)
    train(tmp_path / "cut", corpus, MUON, until=17)
    resumed = train(tmp_path / "cut", corpus, MUON)
    assert resumed.losses == whole.losses
    assert_equal_weights(resumed.model, whole.model)
    assert whole.losses[-1] < whole.losses[0]


@pytest.mark.parametrize("matrix_learning_rate", [0.0, 5e-3])
def test_state_of_the_optimisers_is_needed_to_go_on(
    matrix_learning_rate: float, corpus: Corpus, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, matrix_learning_rate=matrix_learning_rate)
    trainer = Trainer(student(), corpus, settings, tmp_path)
    trainer.run(until=5)
    state = trainer._optimizers.state_dict()
    assert len(state["parts"]) == (2 if matrix_learning_rate else 1)
    assert all(part["state"] for part in state["parts"])
