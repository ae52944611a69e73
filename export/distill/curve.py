"""The loss curve of a training, as a table and as a picture."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

FIELDS: Final = ("step", "loss", "answer_cross_entropy", "learning_rate", "tokens_per_s")


def write_table(curve: Sequence[Mapping[str, float]], folder: Path) -> None:
    """Write ``loss.csv``: one row for every few steps, with the means over them."""
    with (folder / "loss.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, FIELDS)
        writer.writeheader()
        writer.writerows(curve)


def write_picture(curve: Sequence[Mapping[str, float]], folder: Path) -> None:
    """Write ``loss.png``: loss and cross entropy over the steps, on a logarithmic axis, and the learning rate below."""
    # No display is needed, and none of pyplot's global state.
    from matplotlib.figure import Figure

    steps = [point["step"] for point in curve]
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    losses.plot(steps, [point["loss"] for point in curve], label="loss")
    losses.plot(steps, [point["answer_cross_entropy"] for point in curve], label="cross entropy of answers (nats)")
    losses.set_yscale("log")
    losses.grid(visible=True, which="both", alpha=0.3)
    losses.legend()
    rates.plot(steps, [point["learning_rate"] for point in curve], color="grey")
    rates.set(xlabel="step", ylabel="learning rate")
    figure.savefig(folder / "loss.png")
