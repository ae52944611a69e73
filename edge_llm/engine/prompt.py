"""Rendering a conversation into token ids, by the manifest's fixed pieces."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from edge_llm.errors import ManifestError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from edge_llm.bundle.manifest import PromptTemplate
    from edge_llm.engine.tokenizer import Tokenizer

Role = Literal["system", "user", "assistant"]

# Beginnings of words that share no first character or token: what several prompts have in common before them does not
# depend on what comes.
_PROBES: Final = ("a", "Zq", "7", "(", "é")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


class PromptRenderer:
    """Renders conversations as the model's own chat template would.

    Args:
        template: the manifest's pieces.
        tokenizer: the bundle's tokenizer.

    Raises:
        ManifestError: a special token of the template is not in the vocabulary.
    """

    def __init__(self, template: PromptTemplate, tokenizer: Tokenizer) -> None:
        self.template = template
        self._tokenizer = tokenizer
        self._special_ids: dict[str, int] = {}
        self._fixed_ids: dict[str, list[int]] = {}  # as many as the template has pieces
        for token in template.special_tokens:
            token_id = tokenizer.token_id(token)
            if token_id is None:
                raise ManifestError(f"the prompt template's special token {token!r} is not in tokenizer.json")
            self._special_ids[token] = token_id
        # Longest first, so that a token which begins another does not hide it.
        alternatives = sorted(map(re.escape, template.special_tokens), key=len, reverse=True)
        self._special_pattern = re.compile("(" + "|".join(alternatives) + ")") if alternatives else None

    @property
    def supports_system(self) -> bool:
        """Whether the template has a place for a system message."""
        return self.template.system is not None

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids."""
        return self._tokenizer.decode(token_ids)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation that ends with a user message, ready for the answer."""
        token_ids: list[int] = []
        plain, fixed = "", True
        # Text between two special tokens is encoded in one piece, as the tokenizer itself would: token boundaries
        # must not depend on where a template piece ends and the user's words begin.
        for text, is_template in self._pieces(messages):
            parts = self._special_pattern.split(text) if is_template and self._special_pattern else [text]
            for part in parts:
                special_id = self._special_ids.get(part) if is_template else None
                if special_id is None:
                    plain += part
                    fixed = fixed and is_template
                    continue
                token_ids += self._encode_plain(plain, fixed=fixed)
                token_ids.append(special_id)
                plain, fixed = "", True
        return token_ids + self._encode_plain(plain, fixed=fixed)

    def _encode_plain(self, text: str, *, fixed: bool) -> list[int]:
        """Encode text between two special tokens; what is the template's alone is encoded once."""
        if not text:
            return []
        if not fixed:
            return self._tokenizer.encode(text)
        known = self._fixed_ids.get(text)
        if known is None:
            known = self._fixed_ids[text] = self._tokenizer.encode(text)
        return known

    def shared_prefix(self, system: str | None = None) -> list[int]:
        """Token ids that every conversation begins with: all that comes before a user's first words.

        Args:
            system: of the conversations with this system message; None is the template's default.
        """
        head = [] if system is None else [Message("system", system)]
        return self._common([[*head, Message("user", probe)] for probe in _PROBES])

    def open_prefix(self, history: Sequence[Message], text: str) -> list[int]:
        """Token ids of a conversation whose last message begins with ``text`` and goes on with another word.

        Args:
            history: the messages before it.
            text: whole words; may be empty.
        """
        words = f"{text} " if text else ""
        return self._common([[*history, Message("user", words + probe)] for probe in _PROBES[:3]])

    def _common(self, conversations: Sequence[Sequence[Message]]) -> list[int]:
        prompts = [self.encode(messages) for messages in conversations]
        # The first and the last in order differ the earliest.
        first, last = min(prompts), max(prompts)
        return first[: common_prefix_length(first, last)]

    def _pieces(self, messages: Sequence[Message]) -> Iterator[tuple[str, bool]]:
        """The prompt as (text, whether it is the template's own) in order."""
        template = self.template
        yield template.prefix, True
        roles = {"system": template.system, "user": template.user, "assistant": template.assistant}
        if template.default_system is not None and template.system and (not messages or messages[0].role != "system"):
            yield template.system.before, True
            yield template.default_system, True
            yield template.system.after, True
        for message in messages:
            pieces = roles[message.role]
            assert pieces is not None, "admission refuses a system message where the template has none"
            yield pieces.before, True
            yield message.content.strip() if template.strip_content else message.content, False
            yield pieces.after, True
        yield template.generation_prompt, True


def common_prefix_length(left: Sequence[int], right: Sequence[int]) -> int:
    """How many leading tokens two sequences share."""
    shorter = min(len(left), len(right))
    if left[:shorter] == right[:shorter]:
        return shorter
    return next(index for index in range(shorter) if left[index] != right[index])
