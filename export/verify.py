"""How close a graph is to the float32 graph of the same weights, measured with the engine that will serve it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import tokenizers

from edge_llm.bundle.manifest import Expectation, GraphQuality
from edge_llm.engine.runner import ModelRunner, Runner
from edge_llm.engine.static_runner import StaticRunner
from export.console import progress
from export.errors import ExportError
from export.verify_static import open_for_texts, static_paths

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from edge_llm.bundle.manifest import ModelDims
    from export.graph.weights import WeightFormat
    from export.tensors import Float32Array

DEFAULT_TEXT: Final = Path(__file__).parent / "data" / "verify_text.txt"
DEFAULT_MAX_PERPLEXITY_RATIO: Final = 1.01
# Its matrices are those of cpu-int8, its activations are not quantised.
DEFAULT_MAX_CUDA_PERPLEXITY_RATIO: Final = 1.005
# Nothing but the rounding to float16.
DEFAULT_MAX_TENSORRT_PERPLEXITY_RATIO: Final = 1.002
# Activations in int8 as well, with one scale for all channels.
DEFAULT_MAX_TENSORRT_INT8_PERPLEXITY_RATIO: Final = 1.02
_LIMIT_FLAGS: Final = {
    "cuda": "--max-cuda-perplexity-ratio",
    "tensorrt": "--max-tensorrt-perplexity-ratio",
    "tensorrt-int8": "--max-tensorrt-int8-perplexity-ratio",
    "tensorrt-primitive": "--max-tensorrt-perplexity-ratio",
}
# A longer text tells no more and takes minutes.
_MAX_TOKENS: Final = 16_384
_WINDOW_TOKENS: Final = 512
# Logits of a chunk are (chunk, vocabulary) float32: 128 rows of 50,257 are 26 MB.
_CHUNK_TOKENS: Final = 128
_MIN_TOKENS: Final = 32
# Below this distance of the two best logits, processors may rightly disagree about the best.
_CLEAR_MARGIN: Final = 1e-3


@dataclass(frozen=True)
class Comparison:
    """A graph against the reference over one text.

    Attributes:
        tokens: predictions compared.
        perplexity: of the graph.
        reference_perplexity: of the reference.
        top1_agreement: share of positions whose most likely token is the same.
        mean_kl: mean of KL(reference || graph) over positions, in nats.
        max_logit_difference: largest absolute difference of a logit.
    """

    tokens: int
    perplexity: float
    reference_perplexity: float
    top1_agreement: float
    mean_kl: float
    max_logit_difference: float

    @property
    def perplexity_ratio(self) -> float:
        """How much worse the graph predicts the text; 1 is equal."""
        return self.perplexity / self.reference_perplexity

    def quality(self, target: str, max_perplexity_ratio: float) -> GraphQuality:
        """The manifest's summary."""
        return GraphQuality(
            target=target,
            perplexity_ratio=round(self.perplexity_ratio, 5),
            top1_agreement=round(self.top1_agreement, 5),
            mean_kl=round(self.mean_kl, 6),
            max_perplexity_ratio=max_perplexity_ratio,
        )


def read_text_tokens(path: Path, tokenizer_json: str) -> list[int]:
    """Token ids of the text to verify with.

    Raises:
        ExportError: the file cannot be read, or is too short to tell anything.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ExportError(f"cannot read the verification text {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ExportError(f"the verification text {path} is not UTF-8") from None
    tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
    token_ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    if len(token_ids) < _MIN_TOKENS:
        raise ExportError(
            f"the verification text {path} has {len(token_ids)} tokens: give one of at least {_MIN_TOKENS}, "
            f"better some thousand"
        )
    return token_ids[:_MAX_TOKENS]


def text_windows(token_ids: Sequence[int], max_seq_len: int) -> list[list[int]]:
    """A long text in pieces that fit the context, each of at least two tokens."""
    length = min(_WINDOW_TOKENS, max_seq_len)
    return [list(token_ids[start : start + length]) for start in range(0, len(token_ids) - 1, length)]


def compare(
    graph: ModelRunner, reference: ModelRunner, windows: Sequence[Sequence[int]], description: str
) -> Comparison:
    """Run both over texts, each from an empty cache and in chunks as a prefill has them.

    Args:
        graph: the graph to judge.
        reference: the ``cpu-fp32`` graph of the same weights.
        windows: token ids of each text, no longer than the context.
        description: for the progress bar.
    """
    losses = [0.0, 0.0]
    agreements, divergence, count, largest = 0, 0.0, 0, 0.0
    with progress(description, sum(map(len, windows)), unit="tok") as bar:
        for window in windows:
            chunks = zip(_chunks(graph, window), _chunks(reference, window), strict=True)
            position = 1
            for own, expected in chunks:
                targets = np.asarray(window[position : position + len(own)], np.int64)
                position += len(own)
                bar.update(len(own))
                # The window's last row predicts what is outside it.
                own_log, expected_log = _log_softmax(own[: len(targets)]), _log_softmax(expected[: len(targets)])
                rows = np.arange(len(targets))
                losses[0] -= float(own_log[rows, targets].sum())
                losses[1] -= float(expected_log[rows, targets].sum())
                agreements += int((own_log.argmax(-1) == expected_log.argmax(-1)).sum())
                divergence += float((np.exp(expected_log) * (expected_log - own_log)).sum())
                count += len(targets)
                largest = max(largest, float(np.abs(own - expected).max()))
    assert count, "the text is longer than one token"
    return Comparison(
        tokens=count,
        perplexity=float(np.exp(losses[0] / count)),
        reference_perplexity=float(np.exp(losses[1] / count)),
        top1_agreement=agreements / count,
        mean_kl=divergence / count,
        max_logit_difference=largest,
    )


def check_limit(comparison: Comparison, target: str, max_perplexity_ratio: float) -> None:
    """Raises ``ExportError`` naming the figure if the graph is worse than the limit."""
    ratio = comparison.perplexity_ratio
    flag = _LIMIT_FLAGS.get(target, "--max-perplexity-ratio")
    advice = "leave it out" if "tensorrt" in target else "use --bits 8 or a smaller --block"
    if not ratio <= max_perplexity_ratio:
        raise ExportError(
            f"{target}: perplexity ratio {ratio:.4f} is above the limit of {max_perplexity_ratio:g} (top-1 agreement "
            f"{comparison.top1_agreement:.3f}): no bundle was written; {advice}, or accept it with "
            f"{flag} {np.ceil(ratio * 100) / 100:.2f}"
        )


def expect_greedy(runner: ModelRunner, prompt_token_ids: Sequence[int], count: int = 16) -> Expectation:
    """What this graph generates greedily, for the bundle's self-test.

    The record ends early before a token that is not clearly the best, since another processor's rounding may choose
    the other one.

    Args:
        runner: the serving graph.
        prompt_token_ids: cut at its end if it leaves no room in the context.
        count: tokens to generate.
    """
    prompt = list(prompt_token_ids)[: max(1, runner.max_seq_len - count)]
    generated: list[int] = []
    past_len, chunk = 0, prompt
    while len(generated) < min(count, runner.max_seq_len - len(prompt) + 1):
        logits = runner.forward(0, chunk, past_len, [len(chunk) - 1])[0]
        second, first = np.partition(logits, -2)[-2:]
        if generated and first - second < _CLEAR_MARGIN:
            break
        past_len += len(chunk)
        generated.append(int(logits.argmax()))
        chunk = generated[-1:]
    return Expectation(prompt_token_ids=tuple(prompt), token_ids=tuple(generated))


def open_runner(graph_path: Path, dims: ModelDims, weights: WeightFormat) -> ModelRunner:
    """The serving engine's runner over one target's graph."""
    if weights.is_static:
        return StaticRunner(static_paths(graph_path), dims, kv_dtype=weights.float_type)
    return Runner(graph_path, dims, kv_dtype=weights.float_type)


def open_judged(graph_path: Path, dims: ModelDims, weights: WeightFormat) -> ModelRunner:
    """A runner for ``compare``, which asks for the logits of every token."""
    return (open_for_texts if weights.is_static else open_runner)(graph_path, dims, weights)


def _chunks(runner: ModelRunner, window: Sequence[int]) -> Iterator[Float32Array]:
    """Logits of every position of a window, ``(chunk, vocab)`` at a time."""
    for start in range(0, len(window), _CHUNK_TOKENS):
        chunk = window[start : start + _CHUNK_TOKENS]
        yield runner.forward(0, chunk, start, range(len(chunk)))


def _log_softmax(logits: Float32Array) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    log_probabilities: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return log_probabilities
