"""transformers on PyTorch, float32."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoModelForCausalLM

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from benchmarks.engines import OnToken


class TransformersEngine:
    """The model's forward pass with its default cache."""

    version = f"{transformers.__version__}, torch {torch.__version__}"

    def __init__(self, path: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def generate(self, prompt_ids: Sequence[int], count: int, on_token: OnToken) -> None:
        """The forward pass in a bare loop; only the last position reaches the head, as in ``model.generate``."""
        generate_with(self._model, prompt_ids, count, on_token, logits_to_keep=1)


def generate_with(model: Any, prompt_ids: Sequence[int], count: int, on_token: OnToken, **options: Any) -> None:
    """Greedy decoding with any model that has the interface of transformers."""
    with torch.inference_mode():
        input_ids = torch.tensor([list(prompt_ids)])
        past = None
        for length in range(len(prompt_ids), len(prompt_ids) + count):
            mask = torch.ones((1, length), dtype=torch.int64)
            output = model(input_ids=input_ids, attention_mask=mask, past_key_values=past, use_cache=True, **options)
            past = output.past_key_values
            input_ids = output.logits[:, -1:].argmax(-1)
            on_token(int(input_ids))


def load(path: Path, threads: int, context: int) -> TransformersEngine:  # noqa: ARG001 - its cache grows
    """Load a checkpoint folder."""
    return TransformersEngine(path, threads)
