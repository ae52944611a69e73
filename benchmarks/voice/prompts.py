"""Token ids of what is said, as the daemon renders them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from edge_llm.bundle.manifest import TOKENIZER_FILE
from edge_llm.engine.prompt import Message, PromptRenderer
from edge_llm.engine.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edge_llm.bundle.manifest import Bundle


class Prompts:
    """Prompts of one user message.

    Args:
        bundle: has the tokenizer and the template.
        system_prompt: takes the place of the template's own.

    Attributes:
        shared_tokens: how many tokens every prompt begins with.
    """

    def __init__(self, bundle: Bundle, system_prompt: str) -> None:
        template = msgspec.structs.replace(bundle.manifest.prompt, default_system=system_prompt)
        self._renderer = PromptRenderer(template, Tokenizer.from_file(bundle.verified_path(TOKENIZER_FILE)))
        # What follows the user's words is what two different prompts end with.
        one, other = self.query("one"), self.query("two three")
        self._closing = _same(one[::-1], other[::-1])
        self.shared_tokens = _same(one, other)

    def query(self, text: str) -> list[int]:
        """A whole prompt."""
        return self._renderer.encode([Message("user", text)])

    def partial(self, text: str) -> list[int]:
        """A prompt up to the last of the user's words."""
        token_ids = self.query(text)
        return token_ids[: len(token_ids) - self._closing]


def _same(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two lists begin with alike."""
    pairs = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
