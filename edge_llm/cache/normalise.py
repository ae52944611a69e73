"""When two spellings of a question count as the same."""

from __future__ import annotations

import unicodedata
from typing import Final

# The ellipsis, the full-width forms, and closing quotation marks among them.
_CLOSING: Final = ".?!,;:\"'\u2026\u3002\uff0e\uff1f\uff01\uff0c\uff1b\uff1a\u2019\u201d\u203a\u00bb\u300d\u300f "
# One round is enough for nearly every text; a few characters become something that composes anew.
_MAX_ROUNDS: Final = 8


def normalise(text: str) -> str:
    """Canonical form (NFC), lower case, single spaces, nothing around it and no closing punctuation.

    Nothing that changes what is asked: 5² stays apart from 52, and Maße from Masse.

    The same text is returned for a text that is already normal. It may be empty: such a text has no words, and nothing
    should be remembered for it.
    """
    for _ in range(_MAX_ROUNDS):
        folded = unicodedata.normalize("NFC", text).lower()
        if folded == text:
            break
        text = folded
    return " ".join(text.split()).rstrip(_CLOSING)
