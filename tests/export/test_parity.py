"""The graphs against transformers, for random weights of many shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_llm.engine.runner import Runner
from export.calibrate import measure_magnitudes
from export.checkpoint import Checkpoint
from export.checkpoints import load_checkpoint
from export.errors import ExportError
from export.graph.weights import CPU_FP32, WeightFormat, cpu_int8
from export.graphs import build_graph
from export.smoothing import SmoothedTensors
from export.verify import text_windows
from tests.export.models import gpt2_config, llama_config, random_ids, random_model, save

CONTEXT = 64
PROMPT = random_ids(23)

GPT2_VARIANTS: dict[str, dict[str, Any]] = {
    "three-heads": {},
    "five-heads-of-16": {"n_head": 5, "n_embd": 80},
    "one-head": {"n_head": 1, "n_embd": 32},
    "one-layer-inner-80": {"n_layer": 1, "n_inner": 80, "layer_norm_epsilon": 1e-3},
    "inverse-layer-scale": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    "unscaled-attention": {"scale_attn_weights": False, "n_embd": 24},
    "untied": {"tie_word_embeddings": False},
    "relu": {"activation_function": "relu"},
    "exact-gelu": {"activation_function": "gelu"},
    "silu": {"activation_function": "silu"},
    "quick-gelu": {"activation_function": "quick_gelu"},
    "gelu-tanh": {"activation_function": "gelu_pytorch_tanh"},
    "gelu-fast": {"activation_function": "gelu_fast"},
}

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LLAMA_VARIANTS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "one-kv-head-of-nine": {
        "num_attention_heads": 9,
        "num_key_value_heads": 1,
        "hidden_size": 144,
        "intermediate_size": 48,
    },
    "nine-heads-three-kv": {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 144},
    "every-head-its-own": {"num_key_value_heads": 4},
    "untied": {"tie_word_embeddings": False},
    "wide-heads": {"head_dim": 32},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "theta": {"rope_theta": 100000.0, "rms_norm_eps": 1e-3},
    "llama3-scaling": {"rope_scaling": LLAMA3_SCALING},
    "linear-scaling": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
}


def model_and_checkpoint(config: Any, folder: Path) -> tuple[Any, Checkpoint]:
    model = random_model(config)
    return model, load_checkpoint(str(save(model, folder)))


def run_graph(checkpoint: Checkpoint, weights: WeightFormat, folder: Path) -> Runner:
    dims = checkpoint.architecture.dims(CONTEXT)
    return Runner(build_graph(checkpoint, weights, dims, folder / weights.target), dims)


def expected_logits(model: Any, token_ids: list[int]) -> NDArray[np.float32]:
    import torch

    with torch.no_grad():
        logits: NDArray[np.float32] = model(torch.tensor([token_ids])).logits[0].numpy()
    return logits


def is_greedy_answer(model: Any, prompt: list[int], answer: list[int]) -> bool:
    """Whether each token is the best after those before it: by induction, what ``generate`` would have returned."""
    logits = expected_logits(model, [*prompt, *answer[:-1]])[len(prompt) - 1 :]
    return logits.argmax(-1).tolist() == answer


def assert_equals_transformers(model: Any, runner: Runner) -> None:
    """Logits of a whole and of a chunked prefill, and a greedy answer, token for token."""
    expected = expected_logits(model, PROMPT)
    tolerance = 1e-4 * max(1.0, float(np.abs(expected).max()))
    whole = runner.forward(0, PROMPT, 0, range(len(PROMPT)))
    np.testing.assert_allclose(whole, expected, atol=tolerance)
    for start, end in ((0, 5), (5, 6), (6, len(PROMPT))):
        chunk = runner.forward(0, PROMPT[start:end], start, [end - start - 1])
        np.testing.assert_allclose(chunk[0], expected[end - 1], atol=tolerance)
    answer = [runner.prefill(0, PROMPT, 0)]
    while len(answer) < 32:
        answer.append(int(runner.decode(0, answer[-1:], [len(PROMPT) + len(answer) - 1])[0]))
    assert is_greedy_answer(model, PROMPT, answer)


@pytest.mark.parametrize("variant", GPT2_VARIANTS)
def test_gpt2_equals_transformers(variant: str, tmp_path: Path) -> None:
    model, checkpoint = model_and_checkpoint(gpt2_config(**GPT2_VARIANTS[variant]), tmp_path / "model")
    assert_equals_transformers(model, run_graph(checkpoint, CPU_FP32, tmp_path))


@pytest.mark.parametrize("variant", LLAMA_VARIANTS)
def test_llama_equals_transformers(variant: str, tmp_path: Path) -> None:
    model, checkpoint = model_and_checkpoint(llama_config(**LLAMA_VARIANTS[variant]), tmp_path / "model")
    assert_equals_transformers(model, run_graph(checkpoint, CPU_FP32, tmp_path))


@pytest.mark.parametrize("kind", ["Qwen2Config", "MistralConfig"])
def test_relatives_of_llama_equal_transformers(kind: str, tmp_path: Path) -> None:
    import transformers

    config = llama_config(kind=getattr(transformers, kind), sliding_window=None)
    model, checkpoint = model_and_checkpoint(config, tmp_path / "model")
    assert_equals_transformers(model, run_graph(checkpoint, CPU_FP32, tmp_path))


def relative_error(own: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.square(own - expected).mean()) / expected.std())


@pytest.mark.parametrize(
    ("weights", "limit"),
    [(cpu_int8(), 0.06), (cpu_int8(block_size=32), 0.05), (cpu_int8(bits=4, block_size=16), 0.4)],
    ids=["int8", "int8-block-32", "int4"],
)
@pytest.mark.parametrize(
    "config",
    [
        gpt2_config,
        lambda: gpt2_config(n_head=5, n_embd=80, tie_word_embeddings=False),
        llama_config,
        lambda: llama_config(num_attention_heads=9, num_key_value_heads=3, hidden_size=144, tie_word_embeddings=False),
        lambda: llama_config(attention_bias=True, mlp_bias=True),
    ],
    ids=["gpt2", "gpt2-untied", "llama", "llama-untied", "llama-biases"],
)
def test_quantised_graph_is_close(config: Any, weights: WeightFormat, limit: float, tmp_path: Path) -> None:
    model, checkpoint = model_and_checkpoint(config(), tmp_path / "model")
    own = run_graph(checkpoint, weights, tmp_path).forward(0, PROMPT, 0, range(len(PROMPT)))
    assert relative_error(own, expected_logits(model, PROMPT)) < limit


@pytest.mark.parametrize(
    "config",
    [
        lambda: gpt2_config(tie_word_embeddings=False),
        lambda: llama_config(num_attention_heads=9, num_key_value_heads=3, hidden_size=144, tie_word_embeddings=False),
        lambda: llama_config(attention_bias=True, mlp_bias=True),
    ],
    ids=["gpt2", "llama", "llama-biases"],
)
def test_smoothing_changes_nothing_in_float32(config: Any, tmp_path: Path) -> None:
    model, checkpoint = model_and_checkpoint(config(), tmp_path / "model")
    dims = checkpoint.architecture.dims(CONTEXT)
    path = build_graph(checkpoint, CPU_FP32, dims, tmp_path / "plain")
    groups = checkpoint.architecture.smoothing_groups()
    windows = text_windows(random_ids(200, seed=3), CONTEXT)
    magnitudes = measure_magnitudes(path, dims, [group.activation for group in groups], windows)
    smoothed = SmoothedTensors(checkpoint.tensors, groups, magnitudes)
    changed = [
        name for name in smoothed.shapes if not np.array_equal(smoothed.read(name), checkpoint.tensors.read(name))
    ]
    assert len(changed) >= 8
    graph = build_graph(replace_tensors(checkpoint, smoothed), CPU_FP32, dims, tmp_path / "smoothed")
    assert_equals_transformers(model, Runner(graph, dims))


def replace_tensors(checkpoint: Checkpoint, tensors: Any) -> Checkpoint:
    from dataclasses import replace

    return replace(checkpoint, tensors=tensors)


def test_logit_indices_choose_rows(tmp_path: Path) -> None:
    _, checkpoint = model_and_checkpoint(gpt2_config(), tmp_path / "model")
    runner = run_graph(checkpoint, cpu_int8(), tmp_path)
    every = runner.forward(0, PROMPT, 0, range(len(PROMPT)))
    np.testing.assert_allclose(runner.forward(0, PROMPT, 0, [4, 2, 22]), every[[4, 2, 22]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (lambda: gpt2_config(n_head=4, n_embd=48), "multiple of 8"),
        (lambda: llama_config(num_attention_heads=8, num_key_value_heads=2), "multiple of 16"),
    ],
    ids=["gpt2-heads-of-12", "llama-heads-of-8"],
)
def test_heads_that_the_kernel_refuses_are_named(config: Any, words: str, tmp_path: Path) -> None:
    _, checkpoint = model_and_checkpoint(config(), tmp_path / "model")
    with pytest.raises(ExportError, match=words):
        checkpoint.architecture.dims(CONTEXT)
