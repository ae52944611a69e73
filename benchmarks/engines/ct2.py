"""CTranslate2, int8."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import ctranslate2

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from benchmarks.engines import OnToken


class CTranslate2Engine:
    """A generator whose callback tells when each token is known.

    ``include_prompt_in_result=False`` is the faster way through a prompt: one forward pass instead of a step a token.
    """

    version = ctranslate2.__version__

    def __init__(self, path: Path, threads: int) -> None:
        vocabulary = json.loads((path / "vocabulary.json").read_text(encoding="utf-8"))
        self._tokens: list[str] = vocabulary
        self._generator = ctranslate2.Generator(
            str(path), device="cpu", compute_type="int8", inter_threads=1, intra_threads=threads
        )

    def generate(self, prompt_ids: Sequence[int], count: int, on_token: OnToken) -> None:
        """Greedy search; ``min_length`` keeps the end token out."""

        def on_step(step: ctranslate2.GenerationStepResult) -> bool:
            on_token(step.token_id)
            return False

        self._generator.generate_batch(
            [[self._tokens[token_id] for token_id in prompt_ids]],
            beam_size=1,
            sampling_topk=1,
            max_length=count,
            min_length=count,
            include_prompt_in_result=False,
            callback=on_step,
        )


def load(path: Path, threads: int, context: int) -> CTranslate2Engine:  # noqa: ARG001 - its cache grows
    """Load a converted model folder."""
    return CTranslate2Engine(path, threads)
