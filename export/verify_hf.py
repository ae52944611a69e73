"""The float32 graph against transformers' own forward pass: the same tokens, nearly the same logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from export.architectures.gpt2 import Gpt2Config
from export.architectures.llama import LlamaConfig
from export.console import say
from export.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edge_llm.engine.runner import Runner
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


def compare_with_transformers(checkpoint: Checkpoint, reference: Runner, token_ids: Sequence[int]) -> dict[str, Any]:
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
        return _from_tensors(checkpoint).eval()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint.path, dtype=torch.float32, local_files_only=True, attn_implementation="eager"
        )
    except Exception as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExportError(f"transformers cannot load {checkpoint.path}: {first_line}") from None
    return model.eval()


def _from_tensors(checkpoint: Checkpoint) -> Any:
    """A transformers model of a GGUF's weights: its own reader of GGUF would want one more package."""
    import torch
    import transformers

    architecture = checkpoint.architecture
    if isinstance(architecture, Gpt2Config):
        prefix, model = "transformer.", transformers.GPT2LMHeadModel(_gpt2_config(architecture))
    else:
        assert isinstance(architecture, LlamaConfig)
        prefix, model = "model.", transformers.LlamaForCausalLM(_llama_config(architecture))
        frequencies = architecture.inverse_frequencies(checkpoint.tensors)
        model.model.rotary_emb.inv_freq = torch.from_numpy(frequencies)
    state = {}
    for name in checkpoint.tensors.shapes:
        values = checkpoint.tensors.read(name)
        if isinstance(architecture, LlamaConfig) and architecture.rotary_interleaved:
            values = _half_split(name, values, architecture)
        state[name if name.startswith("lm_head") else prefix + name] = torch.from_numpy(values)
    missing = [
        name for name in model.load_state_dict(state, strict=False).missing_keys if not name.startswith("lm_head")
    ]
    for name in missing:
        # transformers gives the output projection a bias with those of Q, K and V; the checkpoint has none.
        torch.nn.init.zeros_(model.get_parameter(name))
    return model


def _gpt2_config(config: Gpt2Config) -> Any:
    import transformers

    return transformers.GPT2Config(
        n_layer=config.num_layers,
        n_head=config.num_heads,
        n_embd=config.hidden_size,
        n_inner=config.inner_size,
        n_positions=config.context_length,
        vocab_size=config.vocab_size,
        layer_norm_epsilon=config.layer_norm_epsilon,
        activation_function=config.activation,
        tie_word_embeddings=config.tied,
        attn_implementation="eager",
    )


def _llama_config(config: LlamaConfig) -> Any:
    import transformers

    return transformers.LlamaConfig(
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        hidden_size=config.hidden_size,
        intermediate_size=config.inner_size,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.context_length,
        rms_norm_eps=config.rms_norm_eps,
        attention_bias=bool(config.biased),
        tie_word_embeddings=config.tied,
        attn_implementation="eager",
    )


def _half_split(name: str, values: Float32Array, config: LlamaConfig) -> Float32Array:
    """Q and K rows of a GGUF in the order of Hugging Face: first halves of the rotated pairs, then second halves."""
    if ".q_proj." not in name and ".k_proj." not in name:
        return values
    pairs = values.reshape(-1, config.head_dim // 2, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(values.shape))


def _forward(model: Any, token_ids: Sequence[int]) -> Float32Array:
    """Logits ``(tokens, vocab)`` float32."""
    import torch

    with torch.no_grad():
        logits: Float32Array = model(torch.tensor([list(token_ids)])).logits[0].float().numpy()
    return logits


def _greedy(runner: Runner, prompt: Sequence[int], count: int) -> list[int]:
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
