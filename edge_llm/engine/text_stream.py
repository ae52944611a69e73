"""Token ids to text while they come: whole characters only, and nothing that may still turn into a stop string."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edge_llm.engine.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
# The window moves on only at a character's edge, or here: so many tokens without one are no text.
_MAX_WINDOW_TOKENS = 32


class TextStream:
    """The text of one answer.

    Decoding a token alone would lose the spaces and characters that it shares with its neighbours, so a short window is
    decoded twice, with and without the new tokens, and the difference is the new text (the method of
    text-generation-inference's and vLLM's detokenizers).

    Args:
        tokenizer: decodes.
        stop: strings that end the answer; they may span token edges and are not part of the text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._token_ids: list[int] = []
        self._window_start = 0
        self._decoded_len = 0  # tokens before this have been taken over whole
        self._taken_chars = 0  # of the text of the tokens after that
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token_ids: Sequence[int]) -> str:
        """Take new tokens; returns the text that is now certain, which may be empty."""
        released = ""
        # One by one: several at once might step over every character's edge, and the window would never move on.
        for token_id in token_ids:
            self._token_ids.append(token_id)
            released += self._release(self._decode_new())
        return released

    def finish(self) -> str:
        """The answer has ended: returns what was held back, without an incomplete last character."""
        released, self._held = self._held, ""
        self.text += released
        return released

    def _decode_new(self) -> str:
        window = self._token_ids[self._window_start :]
        before = self._tokenizer.decode(window[: self._decoded_len - self._window_start])
        new = self._tokenizer.decode(window)[len(before) :]
        # One replacement character at the end may be the beginning of a character; an earlier one never will be.
        incomplete = new.endswith(_REPLACEMENT)
        certain = new[self._taken_chars : len(new) - incomplete]
        if incomplete and len(self._token_ids) - self._decoded_len < _MAX_WINDOW_TOKENS:
            self._taken_chars += len(certain)
        else:
            self._window_start, self._decoded_len = self._decoded_len, len(self._token_ids)
            self._taken_chars = 0
        return certain

    def _release(self, new: str) -> str:
        if self.stopped:
            return ""
        candidate = self._held + new
        found = [index for index in (candidate.find(stop) for stop in self._stop) if index >= 0]
        if found:
            self.stopped = True
            released, self._held = candidate[: min(found)], ""
        else:
            held_len = max((_overlap(candidate, stop) for stop in self._stop), default=0)
            released, self._held = candidate[: len(candidate) - held_len], candidate[len(candidate) - held_len :]
        self.text += released
        return released


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
