"""Whether a float16 graph stays within float16's range and answers as the bundle's other graphs do.

It is as much as the CPU provider can tell: that one computes some operators in float32 and rounds only their results.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from export.calibrate import measure_largest
from export.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from edge_llm.bundle.manifest import ModelDims
    from edge_llm.engine.runner import ModelRunner
    from export.tensors import Float32Array

# float16 ends at 65,504; other texts than this one will reach further.
MAX_ACTIVATION: Final = 30_000.0
HARDWARE_NOTE: Final = (
    "measured on the CPU provider, which may compute in float32 inside an operator: float16 arithmetic itself has not "
    "been verified on hardware"
)
_LISTED_TENSORS: Final = 8
_GREEDY_TOKENS: Final = 64
_PROMPT_TOKENS: Final = 48
# Prefill goes in two unequal chunks, so that appending to a past is compared too.
_FIRST_CHUNK: Final = 21
# Of the logits' spread. Measured on SmolLM2-135M, two quantised graphs differ by some 5 % of it in a single logit, and
# where they chose differently, the two candidates were at most 3.4 % apart.
_NEAR_TIE: Final = 0.1


class GreedyAgreement(NamedTuple):
    """How far two graphs choose the same tokens.

    Attributes:
        tokens: how many were generated.
        equal: how many both found the most likely one.
        near_ties: others, in each of which both graphs held the two candidates to be nearly as likely.
    """

    tokens: int
    equal: int
    near_ties: int


def check_activations(
    graph_path: Path, dims: ModelDims, target: str, windows: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Run the texts and look at every tensor of the graph.

    Args:
        graph_path: a float16 graph; of a static form, the one for prefill.
        dims: the model's shape.
        target: what to call it.
        windows: token ids of texts that each fit the context.

    Returns:
        The entries for quality.json: the largest absolute value, and the tensors with the largest ones.

    Raises:
        ExportError: naming the first tensor that goes beyond ``MAX_ACTIVATION``.
    """
    largest = measure_largest(graph_path, dims, windows, f"range of {target}")
    for name, value in largest.items():
        if not value <= MAX_ACTIVATION:
            size = f"reaches {value:,.0f}" if math.isfinite(value) else "overflows float16"
            raise ExportError(
                f"{target}: the tensor {name!r} {size}, more than the {MAX_ACTIVATION:,.0f} that leave float16 room: "
                f"no bundle was written; leave {target} out of --target for this model"
            )
    ranked = sorted(largest.items(), key=lambda entry: -entry[1])
    return {
        "max_abs_activation": ranked[0][1],
        "largest_tensors": dict(ranked[:_LISTED_TENSORS]),
        "float16": HARDWARE_NOTE,
    }


def compare_greedy(
    graph: ModelRunner, reference: ModelRunner, target: str, windows: Sequence[Sequence[int]], *, strict: bool = True
) -> GreedyAgreement:
    """Prefill the beginning of a text in chunks, then decode greedily; both graphs are given the reference's tokens.

    Args:
        graph: the graph to judge.
        reference: another graph of the same weights.
        target: what to call the graph.
        windows: token ids of texts; the first ones are the prompt.
        strict: whether the graphs have the same weights, so that they must agree.

    Raises:
        ExportError: the two must agree and choose differently, and not because of a near tie.
    """
    room = graph.max_seq_len // 2
    prompt = list(itertools.islice(itertools.chain.from_iterable(windows), min(_PROMPT_TOKENS, room)))
    count = min(_GREEDY_TOKENS, graph.max_seq_len - len(prompt))
    first = min(_FIRST_CHUNK, len(prompt) // 2)
    for runner in (graph, reference):
        runner.forward(0, prompt[:first], 0, [first - 1])
    chunk, past_len, equal, near_ties = prompt[first:], first, 0, 0
    for step in range(count):
        own, expected = (runner.forward(0, chunk, past_len, [len(chunk) - 1])[0] for runner in (graph, reference))
        past_len += len(chunk)
        chosen, token_id = int(own.argmax()), int(expected.argmax())
        is_near = _nearly_best(own, token_id) and _nearly_best(expected, chosen)
        equal += chosen == token_id
        near_ties += is_near and chosen != token_id
        if strict and not is_near:
            raise ExportError(
                f"{target}: greedy token {step} is {chosen}, the reference graph says {token_id}, and it is no near "
                f"tie (logits {own[chosen]:.3f} and {own[token_id]:.3f} here, {expected[chosen]:.3f} and "
                f"{expected[token_id]:.3f} there): please report it"
            )
        chunk = [token_id]
    return GreedyAgreement(count, equal, near_ties)


def _nearly_best(logits: Float32Array, token_id: int) -> bool:
    return bool(logits.max() - logits[token_id] <= _NEAR_TIE * np.std(logits))
