"""The float32 graph against transformers' own forward pass: the same tokens, nearly the same logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from export.console import say
from export.errors import ExportError
from export.torch_model import model_from_tensors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edge_llm.engine.runner import ModelRunner
    from export.checkpoint import Checkpoint
    from export.tensors import Float32Array

_PROMPT_TOKENS: Final = 32
_GREEDY_TOKENS: Final = 48
# Prefill goes in two unequal chunks, so that appending to a past is compared too.
_FIRST_CHUNK: Final = 13
# Two orders of summation of the same float32 numbers: relative to the spread of the logits.
_RELATIVE_TOLERANCE: Final = 1e-3
# Where the two best logits are closer than this, either may win.
_CLEAR_MARGIN: Final = 1e-3


def compare_with_transformers(
    checkpoint: Checkpoint, reference: ModelRunner, token_ids: Sequence[int]
) -> dict[str, Any]:
    """Compare logits over a prompt and tokens of a greedy answer.

    Args:
        checkpoint: what transformers loads, by its path.
        reference: the ``cpu-fp32`` graph.
        token_ids: a text; its beginning is the prompt.

    Returns:
        The entry for quality.json.

    Raises:
        ExportError: torch or transformers is missing, transformers cannot load the checkpoint, or they differ.
    """
    count = max(_FIRST_CHUNK + 1, min(_PROMPT_TOKENS, reference.max_seq_len // 2))
    answer_count = min(_GREEDY_TOKENS, reference.max_seq_len - count)
    prompt = list(token_ids[:count])
    model = _load(checkpoint)
    say("comparing with transformers")
    expected = _forward(model, prompt)
    own = np.concatenate(
        [
            reference.forward(0, prompt[:_FIRST_CHUNK], 0, range(_FIRST_CHUNK)),
            reference.forward(0, prompt[_FIRST_CHUNK:], _FIRST_CHUNK, range(count - _FIRST_CHUNK)),
        ]
    )
    difference = float(np.abs(own - expected).max())
    tolerance = _RELATIVE_TOLERANCE * float(expected.std())
    if not difference <= tolerance:
        raise ExportError(
            f"the cpu-fp32 graph's logits differ from transformers' by {difference:.2g}, more than {tolerance:.2g}: "
            f"this checkpoint is a variant that the exporter does not know; please report it"
        )
    answer = _greedy(reference, prompt, answer_count)
    _check_greedy(model, prompt, answer)
    return {
        "max_logit_difference": float(f"{difference:.2g}"),
        "logit_tolerance": float(f"{tolerance:.2g}"),
        "greedy_tokens_equal": len(answer),
    }


def _load(checkpoint: Checkpoint) -> Any:
    try:
        import torch
        import transformers
    except ImportError:
        raise ExportError("--verify hf needs torch and transformers: pip install 'edge-llm[export]'") from None
    say("loading the checkpoint with transformers")
    torch.manual_seed(0)
    if checkpoint.path is None or checkpoint.path.is_file():
        return model_from_tensors(checkpoint).eval()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint.path, dtype=torch.float32, local_files_only=True, attn_implementation="eager"
        )
    except Exception as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExportError(f"transformers cannot load {checkpoint.path}: {first_line}") from None
    return model.eval()


def _forward(model: Any, token_ids: Sequence[int]) -> Float32Array:
    """Logits ``(tokens, vocab)`` float32."""
    import torch

    with torch.no_grad():
        logits: Float32Array = model(torch.tensor([list(token_ids)])).logits[0].float().numpy()
    return logits


def _greedy(runner: ModelRunner, prompt: Sequence[int], count: int) -> list[int]:
    answer: list[int] = []
    chunk, past_len = list(prompt), 0
    while len(answer) < count:
        logits = runner.forward(0, chunk, past_len, [len(chunk) - 1])[0]
        past_len += len(chunk)
        answer.append(int(logits.argmax()))
        chunk = answer[-1:]
    return answer


def _check_greedy(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> None:
    """Raise unless transformers, given the same tokens so far, finds each next token the best or as good as that."""
    logits = _forward(model, [*prompt, *answer[:-1]])[len(prompt) - 1 :]
    for position, (row, token_id) in enumerate(zip(logits, answer, strict=True)):
        if float(row.max() - row[token_id]) > _CLEAR_MARGIN:
            raise ExportError(
                f"greedy token {position} of the cpu-fp32 graph is {token_id}, transformers says {int(row.argmax())}: "
                f"this checkpoint is a variant that the exporter does not know; please report it"
            )
