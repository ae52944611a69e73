"""A smaller vocabulary: the tokens that a corpus uses, every byte, every merge ancestor; any text still round-trips.

A token's head row is read for every token that is generated, so rows that no answer needs cost time and memory. BPE
always applies the applicable merge of the lowest rank. If every token of a text is kept with all that it is merged
from, each merge that the full tokenizer makes is kept, and no other kept one can come before it: texts of the corpus
keep their tokens, and any other text is spelled in more of them.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from tokenizers import AddedToken, Tokenizer, pre_tokenizers

from export.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from export.checkpoint import Checkpoint
    from export.tensors import Float32Array, Shapes, Tensors

# Tables with a row for each token, by their names in the checkpoints that are supported.
_TOKEN_TABLES: Final = ("wte.weight", "embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class TrimmedVocabulary:
    """A vocabulary made smaller.

    Attributes:
        tokenizer_json: contents of the new tokenizer.json.
        kept_ids: ``(new_size,)`` int64; for each new id the id that it had.
    """

    tokenizer_json: str
    kept_ids: NDArray[np.int64]

    @property
    def size(self) -> int:
        """Tokens that are left."""
        return int(self.kept_ids.size)

    def new_ids(self) -> dict[int, int]:
        """Old id to new id."""
        return {int(old): new for new, old in enumerate(self.kept_ids)}


def trim_vocabulary(tokenizer_json: str, texts: Iterable[str], max_size: int) -> TrimmedVocabulary:
    """Keep at most ``max_size`` tokens of a byte-level BPE tokenizer.

    Args:
        tokenizer_json: contents of tokenizer.json.
        texts: the corpus; its tokens come first, by frequency. What is left goes to the merges of the lowest rank.
        max_size: the bound, added tokens included.

    Raises:
        ExportError: the tokenizer is not byte-level BPE, or bytes and added tokens alone are more.
    """
    content = json.loads(tokenizer_json)
    model, added = content["model"], content["added_tokens"]
    if model.get("type") != "BPE" or model.get("byte_fallback") or not _is_byte_level(content):
        raise ExportError("only a byte-level BPE tokenizer can be trimmed: leave --vocabulary out for this model")
    vocab: dict[str, int] = model["vocab"]
    parents = _parents(model["merges"])
    kept = {vocab[token] for token in pre_tokenizers.ByteLevel.alphabet() if token in vocab}
    kept |= {entry["id"] for entry in added}
    if len(kept) > max_size:
        raise ExportError(
            f"--vocabulary is too small: it leaves {max(0, max_size)} tokens, bytes and special ones are {len(kept)}"
        )
    text_of = {token_id: token for token, token_id in vocab.items()}
    ranked = (vocab[token] for token in parents)
    for token_id in [*_by_frequency(tokenizer_json, texts), *ranked]:
        family = _family(text_of[token_id], parents, vocab) - kept if token_id in text_of else set()
        if len(kept) + len(family) <= max_size:
            kept |= family
    kept_ids = np.array(sorted(kept), np.int64)
    return TrimmedVocabulary(_renumbered(content, kept_ids), kept_ids)


def add_special_tokens(trimmed: TrimmedVocabulary, tokens: Sequence[str]) -> str:
    """tokenizer.json with more special tokens, which get the ids that follow."""
    tokenizer = Tokenizer.from_str(trimmed.tokenizer_json)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    return str(tokenizer.to_str())


def trim_checkpoint(checkpoint: Checkpoint, trimmed: TrimmedVocabulary) -> Checkpoint:
    """The same model over the tokens that ``trim_vocabulary`` kept: the logits of those tokens do not change.

    Raises:
        ExportError: a token that ends an answer would be lost.
    """
    new_ids = trimmed.new_ids()
    lost = [token_id for token_id in checkpoint.eos_token_ids if token_id not in new_ids]
    if lost:
        raise ExportError(f"the token {lost[0]}, which ends an answer, is not a special token: cannot trim")
    return replace(
        checkpoint,
        architecture=replace(checkpoint.architecture, vocab_size=trimmed.size),  # type: ignore[type-var]
        tensors=_TrimmedTensors(checkpoint.tensors, trimmed.kept_ids),
        tokenizer_json=trimmed.tokenizer_json,
        eos_token_ids=tuple(new_ids[token_id] for token_id in checkpoint.eos_token_ids),
        # The files there are those of the whole model.
        path=None,
    )


class _TrimmedTensors:
    """A checkpoint's weights with the rows of the kept tokens only."""

    def __init__(self, tensors: Tensors, kept_ids: NDArray[np.int64]) -> None:
        self._tensors = tensors
        self._kept_ids = kept_ids

    @property
    def shapes(self) -> Shapes:
        shapes = dict(self._tensors.shapes)
        for name in _TOKEN_TABLES:
            if name in shapes:
                shapes[name] = (self._kept_ids.size, *shapes[name][1:])
        return shapes

    def read(self, name: str) -> Float32Array:
        values = self._tensors.read(name)
        return values[self._kept_ids] if name in _TOKEN_TABLES else values


def _is_byte_level(content: dict[str, Any]) -> bool:
    return "ByteLevel" in json.dumps(content.get("pre_tokenizer")) and "ByteLevel" in json.dumps(content.get("decoder"))


def _parents(merges: Sequence[str | Sequence[str]]) -> dict[str, list[str]]:
    """The parts that each merged token can be made of, in order of rank; mostly one way, two parts."""
    parents: dict[str, list[str]] = {}
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        parents.setdefault(left + right, []).extend((left, right))
    return parents


def _family(token: str, parents: dict[str, list[str]], vocab: dict[str, int]) -> set[int]:
    """A token and all that it is merged from, whichever way."""
    family: set[int] = set()
    waiting = [token]
    while waiting:
        part = waiting.pop()
        family.add(vocab[part])
        waiting += parents.get(part, ())
    return family


def _by_frequency(tokenizer_json: str, texts: Iterable[str]) -> list[int]:
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.encode_special_tokens = True
    counts: Counter[int] = Counter()
    for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False):
        counts.update(encoding.ids)
    return [token_id for token_id, _ in counts.most_common()]


def _renumbered(content: dict[str, Any], kept_ids: NDArray[np.int64]) -> str:
    new_ids = {int(old): new for new, old in enumerate(kept_ids)}
    model = content["model"]
    vocab = {token: new_ids[old] for token, old in model["vocab"].items() if old in new_ids}
    merges = []
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if left in vocab and right in vocab and left + right in vocab:
            merges.append(merge)
    added = [{**entry, "id": new_ids[entry["id"]]} for entry in content["added_tokens"]]
    content = {**content, "model": {**model, "vocab": vocab, "merges": merges}, "added_tokens": added}
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    Tokenizer.from_str(text)
    return text
