"""How a model does on examples that it was not trained on, without generating: teacher forcing tells the same.

Greedy decoding writes exactly the expected tokens if, and only if, each of them is the most likely one after those
before it. So one forward pass over prompt and answer tells whether the model would have answered just so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from export.distill.batches import make_batch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from export.distill.corpus import Corpus

_ROWS: Final = 64


@dataclass(frozen=True)
class Exactness:
    """Per sequence: whether the kind and actions, and whether the whole answer, would come out token for token."""

    actions: list[bool]
    answers: list[bool]


def exactness(model: Any, corpus: Corpus, say_id: int) -> Exactness:
    """Judge every sequence.

    Args:
        model: a transformers causal LM.
        corpus: examples.
        say_id: the token that ends kind and actions.
    """
    import torch

    actions: list[bool] = []
    answers: list[bool] = []
    model.eval()
    for start in range(0, len(corpus), _ROWS):
        indices = np.arange(start, min(start + _ROWS, len(corpus)))
        batch = make_batch(corpus, indices)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(torch.from_numpy(batch.input_ids)).logits
        predicted = logits.argmax(dim=-1).numpy()
        for row, index in enumerate(indices):
            sequence = corpus.sequence(int(index))
            begin = int(corpus.answer_starts[index])
            right = predicted[row, begin - 1 : sequence.size - 1] == sequence[begin:]
            head = int(np.flatnonzero(sequence[begin:] == say_id)[0]) + 1
            actions.append(bool(right[:head].all()))
            answers.append(bool(right.all()))
    return Exactness(actions, answers)


def line_bits_per_byte(model: Any, lines: Sequence[Sequence[int]], num_bytes: int) -> float:
    """Mean code length of lines that have nothing to do with one another, in bits per UTF-8 byte.

    Args:
        model: a transformers causal LM.
        lines: token ids; the first of each is given, the others are predicted.
        num_bytes: length of the text of all lines.
    """
    import torch

    nats = 0.0
    model.eval()
    for line in lines:
        token_ids = torch.tensor([list(line)])
        with torch.no_grad():
            logits = model(token_ids).logits[0, :-1].float()
        nats += float(torch.nn.functional.cross_entropy(logits, token_ids[0, 1:], reduction="sum"))
    return nats / math.log(2) / num_bytes


def bits_per_byte(model: Any, token_ids: Sequence[int], num_bytes: int, window_tokens: int) -> float:
    """Mean code length of a text in bits per UTF-8 byte: comparable between tokenizers, unlike perplexity.

    Args:
        model: a transformers causal LM.
        token_ids: the text.
        num_bytes: its length.
        window_tokens: the model sees at most so many tokens at once.
    """
    step = window_tokens - 1
    windows = [token_ids[start : start + window_tokens] for start in range(0, len(token_ids) - 1, step)]
    return line_bits_per_byte(model, windows, num_bytes)
