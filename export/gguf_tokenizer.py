"""The tokenizer inside a GGUF as tokenizer.json.

Source of the patterns: llama.cpp ``llama-vocab.cpp`` and the models' own tokenizer.json files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers

from export.errors import ExportError
from export.tokenizer_files import byte_level_bpe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_CONTROL: Final = 3
_USER_DEFINED: Final = 4

_LLAMA3_PATTERN: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_QWEN2_PATTERN: Final = _LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")


def _gpt2(_: Tokenizer) -> None:
    """GPT-2's own pattern is what ``byte_level_bpe`` starts with."""


def _smollm(tokenizer: Tokenizer) -> None:
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, tokenizer.pre_tokenizer])


def _split_by(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _llama3(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = _split_by(_LLAMA3_PATTERN)
    # A word that is a token needs no merges to become one.
    tokenizer.model.ignore_merges = True


def _qwen2(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _split_by(_QWEN2_PATTERN)


_PRE_TOKENIZERS: Final[dict[str, Callable[[Tokenizer], None]]] = {
    "gpt-2": _gpt2,
    "default": _gpt2,
    "smollm": _smollm,
    "starcoder": _smollm,
    "refact": _smollm,
    "llama-bpe": _llama3,
    "llama3": _llama3,
    "qwen2": _qwen2,
}


def gguf_tokenizer_json(metadata: Mapping[str, Any]) -> str:
    """tokenizer.json for the vocabulary, merges and pre-tokenizer named in a GGUF's metadata.

    Raises:
        ExportError: the tokenizer's kind or pre-tokenizer is not supported, or the metadata is incomplete.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ExportError(
            f"the GGUF's tokenizer is of kind {kind!r}, only byte-level BPE ('gpt2') is supported: export from the "
            f"Hugging Face folder instead"
        )
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in _PRE_TOKENIZERS:
        known = ", ".join(_PRE_TOKENIZERS)
        raise ExportError(f"the GGUF's pre-tokenizer {pre!r} is not supported, only: {known}")
    tokens, merges = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.merges")
    if not isinstance(tokens, list) or not isinstance(merges, list):
        raise ExportError("the GGUF carries no tokenizer (tokens and merges): export from the Hugging Face folder")
    pairs = [merge.split(" ") for merge in merges]
    if any(len(pair) != 2 for pair in pairs):
        raise ExportError("the GGUF's merges are malformed: a merge is two tokens with a space between")
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    try:
        tokenizer = byte_level_bpe(vocab, [(left, right) for left, right in pairs])
    except Exception as error:
        raise ExportError(f"the GGUF's tokenizer is malformed: {error}") from None
    _PRE_TOKENIZERS[pre](tokenizer)
    types = metadata.get("tokenizer.ggml.token_type", [])
    marked = [(token, kind) for token, kind in zip(tokens, types, strict=False) if kind in (_CONTROL, _USER_DEFINED)]
    # In order of their ids: the library numbers added tokens that are already in the vocabulary as they stand there.
    tokenizer.add_tokens(
        [AddedToken(token, special=token_type == _CONTROL, normalized=False) for token, token_type in marked]
    )
    return str(tokenizer.to_str())
