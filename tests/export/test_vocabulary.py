"""A smaller vocabulary: nothing is lost but room."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from edge_llm.bundle.manifest import Bundle
from edge_llm.engine.tokenizer import Tokenizer
from export.checkpoint import Checkpoint
from export.checkpoints import load_checkpoint
from export.errors import ExportError
from export.vocabulary import TrimmedVocabulary, add_special_tokens, trim_checkpoint, trim_vocabulary
from tests.export.models import VOCAB_SIZE, gpt2_config, llama_config, random_model, save, tokenizer_json
from tests.generate_tiny_bundle import SPECIAL_TOKENS

ALONE = 256 + len(SPECIAL_TOKENS)  # bytes and special tokens
CORPUS = ["Every machine that thinks was a story first.", "Ein Gruß aus Zürich, 20 °C! 你好", " a small  room\n"]
SIZES = [ALONE, ALONE + 1, 290, 340, VOCAB_SIZE, 10_000]


def tokenizer_of(text: str) -> Tokenizer:
    return Tokenizer(Backend.from_str(text))


FULL = tokenizer_of(tokenizer_json())
TRIMMED = {size: trim_vocabulary(tokenizer_json(), CORPUS, size) for size in SIZES}
SMALLER = {size: tokenizer_of(trimmed.tokenizer_json) for size, trimmed in TRIMMED.items()}
TEXTS = st.one_of(
    st.text(),
    st.text(alphabet="".join(CORPUS)),
    st.lists(st.sampled_from(" ".join(CORPUS).split())).map(" ".join),
    st.sampled_from(SPECIAL_TOKENS),
)


@pytest.mark.parametrize("size", SIZES)
@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_any_text_comes_back(size: int, text: str) -> None:
    token_ids = SMALLER[size].encode(text)
    assert SMALLER[size].decode(token_ids) == text
    assert all(0 <= token_id < TRIMMED[size].size for token_id in token_ids)


@pytest.mark.parametrize("size", SIZES)
@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_a_text_whose_tokens_are_kept_keeps_them(size: int, text: str) -> None:
    new_ids = TRIMMED[size].new_ids()
    full = FULL.encode(text)
    if all(token_id in new_ids for token_id in full):
        assert SMALLER[size].encode(text) == [new_ids[token_id] for token_id in full]


@pytest.mark.parametrize("size", [size for size in SIZES if size >= 340])
def test_texts_of_the_corpus_keep_exactly_their_tokens(size: int) -> None:
    new_ids = TRIMMED[size].new_ids()
    for text in CORPUS:
        assert SMALLER[size].encode(text) == [new_ids[token_id] for token_id in FULL.encode(text)]


@pytest.mark.parametrize("size", SIZES)
def test_the_size_is_a_bound_that_is_used(size: int) -> None:
    trimmed = TRIMMED[size]
    assert trimmed.size == SMALLER[size].vocab_size == min(size, VOCAB_SIZE)
    assert trimmed.kept_ids.tolist() == sorted(set(trimmed.kept_ids.tolist()))
    for token in SPECIAL_TOKENS:
        old, new = FULL.token_id(token), SMALLER[size].token_id(token)
        assert trimmed.new_ids()[old] == new


def test_tokens_that_the_corpus_uses_come_before_those_of_low_rank() -> None:
    rare = max(FULL.encode(MIXED))
    assert rare not in trim_vocabulary(tokenizer_json(), [], 300).new_ids()
    assert rare in trim_vocabulary(tokenizer_json(), [MIXED], 300).new_ids()


MIXED = "Grüße aus Zürich"


def two_ways_tokenizer() -> str:
    """``abc`` is ``a`` and ``bc``, or ``ab`` and ``c``; in ``abcd`` it comes about in the way of the higher rank."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("b", "c"), ("c", "d"), ("a", "b"), ("ab", "c"), ("a", "bc")]
    vocab = {token: index for index, token in enumerate([*alphabet, "bc", "cd", "ab", "abc"])}
    backend = Backend(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return str(backend.to_str())


@pytest.mark.parametrize("size", range(256, 261))
def test_a_token_that_is_merged_in_two_ways_is_kept_with_both(size: int) -> None:
    full = tokenizer_of(two_ways_tokenizer())
    trimmed = trim_vocabulary(two_ways_tokenizer(), ["abcd cd cd"], size)
    new_ids = trimmed.new_ids()
    for text in ("abcd", "abc", "bcd", "cd"):
        token_ids = full.encode(text)
        if all(token_id in new_ids for token_id in token_ids):
            assert tokenizer_of(trimmed.tokenizer_json).encode(text) == [new_ids[token_id] for token_id in token_ids]


def test_merges_written_as_strings_or_as_pairs_are_one() -> None:
    content = json.loads(tokenizer_json())
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in content["model"]["merges"]]
    content["model"]["merges"] = [" ".join(pair) for pair in pairs]
    as_strings = trim_vocabulary(json.dumps(content), CORPUS, 340)
    assert as_strings.kept_ids.tolist() == TRIMMED[340].kept_ids.tolist()
    assert tokenizer_of(as_strings.tokenizer_json).encode(CORPUS[0]) == SMALLER[340].encode(CORPUS[0])


def test_more_special_tokens_follow() -> None:
    trimmed = TRIMMED[300 - 10]
    tokenizer = tokenizer_of(add_special_tokens(trimmed, ["<|user|>", "<|action call|>"]))
    assert [tokenizer.token_id(token) for token in ("<|user|>", "<|action call|>")] == [trimmed.size, trimmed.size + 1]
    assert tokenizer.vocab_size == trimmed.size + 2
    text = "<|user|> is no token of a user's"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert trimmed.size not in tokenizer.encode(text)


@pytest.mark.parametrize("size", [0, -5, 100, ALONE - 1])
def test_a_vocabulary_that_is_too_small(size: int) -> None:
    with pytest.raises(ExportError, match=f"too small: it leaves {max(0, size)} tokens, .* are {ALONE}"):
        trim_vocabulary(tokenizer_json(), CORPUS, size)


def word_level(content: dict[str, Any]) -> None:
    content["model"] = {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}


def byte_fallback(content: dict[str, Any]) -> None:
    content["model"]["byte_fallback"] = True


def no_byte_level(content: dict[str, Any]) -> None:
    content["pre_tokenizer"] = {"type": "Whitespace"}


@pytest.mark.parametrize("change", [word_level, byte_fallback, no_byte_level])
def test_other_tokenizers_are_refused(change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(tokenizer_json())
    change(content)
    with pytest.raises(ExportError, match="only a byte-level BPE tokenizer can be trimmed"):
        trim_vocabulary(json.dumps(content), CORPUS, 10_000)


MODELS = {
    "gpt2": gpt2_config,
    "gpt2-untied": lambda: gpt2_config(tie_word_embeddings=False),
    "llama": llama_config,
    "llama-untied": lambda: llama_config(tie_word_embeddings=False),
}


def trimmed_model(name: str, folder: Path) -> tuple[Any, Any, Checkpoint, TrimmedVocabulary]:
    """The model, the one over the trimmed vocabulary, and the latter's checkpoint."""
    from export.torch_model import model_from_tensors

    model = random_model(MODELS[name]())
    trimmed = trim_vocabulary(tokenizer_json(), CORPUS, 340)
    checkpoint = trim_checkpoint(load_checkpoint(str(save(model, folder))), trimmed)
    return model, model_from_tensors(checkpoint).eval(), checkpoint, trimmed


@pytest.mark.parametrize("name", MODELS)
def test_the_logits_of_the_tokens_that_are_kept_do_not_change(name: str, tmp_path: Path) -> None:
    import torch

    model, smaller, _, trimmed = trimmed_model(name, tmp_path)
    new = SMALLER[340].encode("".join(CORPUS))
    old = FULL.encode("".join(CORPUS))
    assert new != old
    assert len(new) == len(old)
    with torch.no_grad():
        expected = model(torch.tensor([old])).logits[0].numpy()
        logits = smaller(torch.tensor([new])).logits[0].numpy()
    assert logits.shape == (len(new), 340)
    np.testing.assert_allclose(logits, expected[:, trimmed.kept_ids], atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_trimmed_checkpoint_agrees_with_itself(name: str, tmp_path: Path) -> None:
    _, _, checkpoint, trimmed = trimmed_model(name, tmp_path)
    assert checkpoint.architecture.vocab_size == 340
    assert checkpoint.path is None
    assert {checkpoint.tokenizer_json} == {trimmed.tokenizer_json}
    own = tokenizer_of(checkpoint.tokenizer_json)
    assert [FULL.decode([int(trimmed.kept_ids[i])]) for i in checkpoint.eos_token_ids] == [
        own.decode([i]) for i in checkpoint.eos_token_ids
    ]
    for tensor, shape in checkpoint.tensors.shapes.items():
        assert checkpoint.tensors.read(tensor).shape == tuple(shape)
        assert VOCAB_SIZE not in shape


def test_an_end_that_would_be_lost_is_refused(gpt2_folder: Path) -> None:
    from dataclasses import replace

    trimmed = TRIMMED[ALONE]
    lost = next(token_id for token_id in range(VOCAB_SIZE) if token_id not in trimmed.new_ids())
    checkpoint = replace(load_checkpoint(str(gpt2_folder)), eos_token_ids=(0, lost))
    with pytest.raises(ExportError, match=f"the token {lost}, which ends an answer"):
        trim_checkpoint(checkpoint, trimmed)


def test_a_bundle_over_a_trimmed_vocabulary(
    llama_folder: Path, short_text: Path, export_command: Callable[..., tuple[int, Path]]
) -> None:
    flags = ("--vocabulary", "340", "--vocabulary-text", str(short_text), "--verify", "hf")
    status, out = export_command(llama_folder, *flags)
    assert status == 0
    bundle = Bundle.open(out)
    bundle.verify()
    assert bundle.manifest.model.vocab_size == 340
    report = json.loads((out / "quality.json").read_text())
    assert report["transformers"]["greedy_tokens_equal"] >= 32
