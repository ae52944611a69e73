"""What distilling is worth: the same student for the same steps, with the teacher and on the text alone."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any, Protocol

from export.console import say

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


class TrainOnce(Protocol):
    """Trains a student from a seed in a folder; returns its held-out bits per byte."""

    def __call__(self, seed: int, folder: Path, *, distilled: bool) -> float:
        """Train."""
        ...


def compare_with_and_without(train: TrainOnce, folder: Path, seeds: Iterable[int]) -> dict[str, Any]:
    """Train both ways from every seed.

    Args:
        train: does it.
        folder: gets a folder for each training, which goes on where it was stopped.
        seeds: of weights and order.

    Returns:
        Held-out bits per byte by seed, both means, and whether distilling won from every seed.
    """
    rows = []
    for seed in seeds:
        row = {
            name: round(train(seed, folder / f"{name}-{seed}", distilled=name == "distilled"), 4)
            for name in ("distilled", "cross_entropy")
        }
        say(f"seed {seed}: held-out bits per byte {row['distilled']} distilled, {row['cross_entropy']} without")
        rows.append({"seed": seed, **row})
    return {
        "held_out_bits_per_byte": rows,
        "mean_distilled": round(statistics.mean(row["distilled"] for row in rows), 4),
        "mean_cross_entropy": round(statistics.mean(row["cross_entropy"] for row in rows), 4),
        "wins_from_every_seed": all(row["distilled"] < row["cross_entropy"] for row in rows),
    }
