"""When two spellings of a question count as the same."""

from __future__ import annotations

import unicodedata
from typing import Final

# NFKC has already turned the full-width forms of these and the ellipsis into ASCII.
_CLOSING: Final = ".?!,;:\"'\u3002\u2019\u201d\u203a\u00bb\u300d\u300f "
# One round is enough for nearly every text; a few characters fold to something that composes anew.
_MAX_ROUNDS: Final = 8


def normalise(text: str) -> str:
    """Compatibility form (NFKC), case folded, single spaces, nothing around it and no closing punctuation.

    The same text is returned for a text that is already normal. It may be empty: such a text has no words, and nothing
    should be remembered for it.
    """
    for _ in range(_MAX_ROUNDS):
        folded = unicodedata.normalize("NFKC", text).casefold()
        if folded == text:
            break
        text = folded
    return " ".join(text.split()).rstrip(_CLOSING)
