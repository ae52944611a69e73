"""tokenizer.json of a Hugging Face folder, and questions about one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from export.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


def load_tokenizer_json(folder: Path) -> str:
    """Contents of tokenizer.json, made from vocab.json and merges.txt if there is only the older pair.

    Raises:
        ExportError: there is neither, or they are malformed.
    """
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ExportError(f"cannot read {path}: {error}") from None
        return normalise_tokenizer_json(text, str(path))
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _from_vocab_and_merges(folder)
    raise ExportError(
        f"{folder} has no tokenizer.json (nor vocab.json and merges.txt): save the model's tokenizer there"
    )


def normalise_tokenizer_json(text: str, source: str) -> str:
    """Drop truncation and padding, which belong to training, and check that the library can load the rest."""
    try:
        content = json.loads(text)
        content["truncation"] = content["padding"] = None
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        Tokenizer.from_str(text)
    except Exception as error:
        raise ExportError(
            f"{source} is not a tokenizer that tokenizers {tokenizers.__version__} reads: {error}"
        ) from None
    return text


def byte_level_bpe(vocab: dict[str, int], merges: list[tuple[str, str]], *, ignore_merges: bool = False) -> Tokenizer:
    """GPT-2's tokenizer: bytes as characters, merged by rank, split by GPT-2's own pattern."""
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=False, ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def token_ids(tokenizer_json: str, tokens: Iterable[str]) -> list[int]:
    """Ids of those of ``tokens`` that are in the vocabulary as special tokens."""
    specials = {entry["content"]: entry["id"] for entry in _content(tokenizer_json)["added_tokens"] if entry["special"]}
    return [specials[token] for token in tokens if token in specials]


def added_tokens(tokenizer_json: str) -> list[str]:
    """Every string that the tokenizer takes out of a text as one token before anything else."""
    return [entry["content"] for entry in _content(tokenizer_json)["added_tokens"]]


def prepends_token(tokenizer_json: str, token: str) -> bool:
    """Whether the tokenizer itself puts ``token`` before a text."""
    tokenizer = Tokenizer.from_str(tokenizer_json)
    encoded: list[str] = tokenizer.encode("a", add_special_tokens=True).tokens
    return encoded[:1] == [token]


def check_vocabulary(tokenizer_json: str, vocab_size: int) -> None:
    """Raises ``ExportError`` if the tokenizer has a token id that the embedding has no row for."""
    vocabulary = Tokenizer.from_str(tokenizer_json).get_vocab(with_added_tokens=True)
    highest = max(vocabulary.values(), default=-1)
    if highest >= vocab_size:
        raise ExportError(
            f"the tokenizer has token ids up to {highest}, the model's vocabulary holds {vocab_size}: the tokenizer "
            f"and the weights do not belong together"
        )


def _content(tokenizer_json: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(tokenizer_json)
    content.setdefault("added_tokens", [])
    return content


def _from_vocab_and_merges(folder: Path) -> str:
    try:
        vocab: dict[str, int] = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        tokenizer = byte_level_bpe(vocab, [(left, right) for left, right in pairs])
        config_path = folder / "added_tokens.json"
        added: dict[str, int] = json.loads(config_path.read_text(encoding="utf-8")) if config_path.is_file() else {}
    except Exception as error:
        raise ExportError(f"vocab.json and merges.txt of {folder} are malformed: {error}") from None
    # GPT-2's one special token is part of its vocabulary, and only its class says that it is special.
    specials = sorted(
        {**added, **{token: vocab[token] for token in ("<|endoftext|>",) if token in vocab}}.items(),
        key=lambda item: item[1],
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token, _ in specials])
    return str(tokenizer.to_str())
