"""GGUF: names, permutations, dequantisation, tokenizer, and every way a file can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer

from export.checkpoints import load_checkpoint
from export.errors import ExportError
from export.graph.weights import CPU_FP32
from tests.export.gguf_files import write_gguf
from tests.export.models import gpt2_config, llama_config, random_model, tokenizer_json
from tests.export.test_parity import assert_equals_transformers, run_graph

Q8_0 = gguf.GGMLQuantizationType.Q8_0


def qwen2_config() -> Any:
    import transformers

    return llama_config(kind=transformers.Qwen2Config)


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("llama", llama_config),
        ("llama", lambda: llama_config(tie_word_embeddings=False, num_key_value_heads=4)),
        ("llama", lambda: llama_config(attention_bias=True)),
        ("qwen2", qwen2_config),
        ("gpt2", gpt2_config),
    ],
    ids=["llama", "llama-untied", "llama-biases", "qwen2", "gpt2"],
)
def test_gguf_equals_transformers(architecture: str, config: Any, tmp_path: Path) -> None:
    model = random_model(config())
    checkpoint = load_checkpoint(str(write_gguf(tmp_path / "model.gguf", model, architecture)))
    assert checkpoint.reference == "F32 weights"
    assert_equals_transformers(model, run_graph(checkpoint, CPU_FP32, tmp_path))


def test_rope_freqs_divide_the_frequencies(tmp_path: Path) -> None:
    import torch

    model = random_model(llama_config())
    divisors = np.linspace(1, 8, 8, dtype=np.float32)
    extra = {"rope_freqs.weight": (divisors, gguf.GGMLQuantizationType.F32)}
    checkpoint = load_checkpoint(str(write_gguf(tmp_path / "model.gguf", model, "llama", extra=extra)))
    model.model.rotary_emb.inv_freq /= torch.from_numpy(divisors)
    assert_equals_transformers(model, run_graph(checkpoint, CPU_FP32, tmp_path))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1", "F16", "BF16"])
def test_types_are_dequantised(kind: str, tmp_path: Path) -> None:
    model = random_model(llama_config())
    matrix_type = gguf.GGMLQuantizationType[kind]
    checkpoint = load_checkpoint(str(write_gguf(tmp_path / "m.gguf", model, "llama", matrix_type=matrix_type)))
    values = model.state_dict()["model.layers.0.mlp.down_proj.weight"].numpy()
    expected = gguf.dequantize(gguf.quantize(values, matrix_type), matrix_type)
    np.testing.assert_array_equal(checkpoint.tensors.read("layers.0.mlp.down_proj.weight"), expected)
    assert checkpoint.reference == (f"{kind} weights" if kind in ("F16", "BF16") else f"dequantised from {kind}")


def test_tokenizer_and_metadata(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", random_model(llama_config()), "llama")
    checkpoint = load_checkpoint(str(path))
    own, original = Tokenizer.from_str(checkpoint.tokenizer_json), Tokenizer.from_str(tokenizer_json())
    text = "<|im_start|>user\nWhat's 1234 + 5?  Größe 你好 🙂<|im_end|>\n"
    assert own.encode(text).ids == original.encode(text).ids
    assert own.decode(own.encode(text).ids) == original.decode(original.encode(text).ids)
    assert own.token_to_id("<|im_end|>") == 2
    assert checkpoint.license == "apache-2.0"
    assert checkpoint.eos_token_ids == (2,)
    assert checkpoint.chat.eos_token == "<|im_end|>"


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("smollm", "ab 123", ["ab", "Ġ", "1", "2", "3"]),
        ("gpt-2", "ab 123", ["ab", "Ġ123"]),
        ("default", "ab 123", ["ab", "Ġ123"]),
        ("llama-bpe", "ab12345 'LL\n\nx", ["ab", "123", "45", "Ġ'", "LL", "ĊĊ", "x"]),
        ("qwen2", "ab12 x", ["ab", "1", "2", "Ġx"]),
    ],
)
def test_pre_tokenizers_split_as_the_models_do(pre: str, text: str, words: list[str], tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", random_model(llama_config()), "llama", pre=pre)
    tokenizer = Tokenizer.from_str(load_checkpoint(str(path)).tokenizer_json)
    assert [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)] == words
    assert json.loads(tokenizer.to_str())["model"]["ignore_merges"] is (pre == "llama-bpe")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pre": "deepseek-llm"}, "pre-tokenizer 'deepseek-llm' is not supported"),
        ({"tokenizer": "llama"}, "of kind 'llama'"),
        (
            {"extra": {"blk.0.odd.weight": (np.zeros((2, 292), np.uint8), gguf.GGMLQuantizationType.Q8_K)}},
            "'blk.0.odd.weight' is of type Q8_K",
        ),
    ],
    ids=["pre-tokenizer", "sentencepiece", "tensor-type"],
)
def test_unsupported_contents_are_named(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", random_model(llama_config()), "llama", **options)
    with pytest.raises(ExportError, match=words):
        load_checkpoint(str(path))


def test_unsupported_architecture_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", random_model(llama_config()), "gemma2")
    with pytest.raises(ExportError, match="architecture 'gemma2' is not supported"):
        load_checkpoint(str(path))


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.3, 0.9, 0.999])
def test_truncated_file(share: float, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", random_model(llama_config()), "llama")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ExportError, match="truncated or not a GGUF"):
        load_checkpoint(str(path))


def test_tensor_type_of_the_future(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", random_model(llama_config()), "llama")
    content = path.read_bytes()
    # A tensor's entry: name, number of dimensions, dimensions (64 bits each), type.
    at = content.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8
    path.write_bytes(content[:at] + (250).to_bytes(4, "little") + content[at + 4 :])
    with pytest.raises(ExportError, match="type number 250"):
        load_checkpoint(str(path))
