"""Text to token ids and back (the tokenizers library, with its memory given back after loading)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import tokenizers

from edge_llm.device.memory import trim_memory
from edge_llm.errors import ManifestError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


class Tokenizer:
    """A bundle's ``tokenizer.json``.

    User text is encoded so that it can never become a special token: those come only from the prompt template, by id.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend

    @classmethod
    def from_file(cls, path: Path) -> Tokenizer:
        """Load ``tokenizer.json``. Raises ``ManifestError`` if it is malformed."""
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise ManifestError(f"{path} is not a tokenizer: {error}") from None
        trim_memory()
        return cls(backend)

    @property
    def vocab_size(self) -> int:
        """Token ids, added ones included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, without special tokens."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids of plain text, and for each the character of ``text`` after its last one."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        return list(encoding.ids), [end for _, end in encoding.offsets]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids; special tokens have none, and an incomplete character at the end shows as U+FFFD."""
        return str(self._backend.decode(list(token_ids), skip_special_tokens=True))

    def token_id(self, token: str) -> int | None:
        """Id of a token by its exact string, or None."""
        token_id: int | None = self._backend.token_to_id(token)
        return token_id
