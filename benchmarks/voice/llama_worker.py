"""llama.cpp hearing the trace: ``python -m benchmarks.voice.llama_worker GGUF THREADS CONTEXT``.

It keeps the time itself, in one process and without MQTT, and answers one JSON object a line on standard output with
one on standard input (benchmarks/voice/peer.py is the other end).
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llama_cpp

from benchmarks.engines.llama import LlamaCppEngine

if TYPE_CHECKING:
    from collections.abc import Sequence


class PromptReuse(LlamaCppEngine):
    """One sequence whose cache keeps what it holds: of a new prompt, only what differs is evaluated.

    ``evaluated`` are the tokens that the cache holds, ``next_id`` the most likely one after them.
    """

    def __init__(self, path: Path, threads: int, context: int) -> None:
        # The faster of its two ways to attend (docs/benchmarks.md).
        super().__init__(path, threads, context, flash_attention=True)
        self._llama_vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._evaluated: list[int] = []
        self._next_id = -1

    def evaluate(self, token_ids: Sequence[int]) -> int:
        """Bring the cache to exactly these tokens; returns how many of them it held already."""
        limit = min(len(self._evaluated), len(token_ids))
        same = next((index for index in range(limit) if self._evaluated[index] != token_ids[index]), limit)
        if same == len(token_ids) == len(self._evaluated):
            return same
        same = min(same, len(token_ids) - 1)  # the last one's logits are needed
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self._context), 0, same, -1)
        self._next_id = self._decode(token_ids[same:], same)
        self._evaluated = list(token_ids)
        return same

    def answer(self, max_tokens: int) -> tuple[float, int]:
        """Greedy tokens after what has been evaluated.

        Returns:
            When the first text was there, in ``time.perf_counter()`` seconds; how many tokens were generated.
        """
        first_at = 0.0
        for count in range(max_tokens):
            token_id = self._next_id
            if llama_cpp.llama_vocab_is_eog(self._llama_vocab, token_id):
                return first_at or time.perf_counter(), count
            if self._text(token_id) and not first_at:
                first_at = time.perf_counter()
            if count < max_tokens - 1:
                self._next_id = self._decode([token_id], len(self._evaluated))
                self._evaluated.append(token_id)
        return first_at or time.perf_counter(), max_tokens

    def _text(self, token_id: int) -> bytes:
        buffer = ctypes.create_string_buffer(64)
        length = llama_cpp.llama_token_to_piece(self._llama_vocab, token_id, buffer, len(buffer), 0, False)
        return buffer.raw[: max(0, length)]


def hear(engine: PromptReuse, utterance: dict[str, Any]) -> dict[str, Any]:
    """One utterance in real time: evaluate each partial when it comes, then answer the query.

    ``partials`` are (seconds, token ids); ``at_s`` is when the query with ``prompt_ids`` comes. A partial that is
    overtaken by the next while another is evaluated is skipped. The time counts from when the query came, even if a
    partial was still being evaluated.
    """
    began = time.perf_counter()
    partials = utterance["partials"]
    for index, (at_s, token_ids) in enumerate(partials):
        next_at_s = partials[index + 1][0] if index + 1 < len(partials) else utterance["at_s"]
        if time.perf_counter() >= began + next_at_s:
            continue
        wait_until(began + at_s)
        engine.evaluate(token_ids)
    came_at = wait_until(began + utterance["at_s"])
    reused = engine.evaluate(utterance["prompt_ids"])
    first_at, count = engine.answer(utterance["max_tokens"])
    decode_s = time.perf_counter() - first_at
    return {
        "first_ms": (first_at - came_at) * 1e3,
        "reused_tokens": reused,
        "completion_tokens": count,
        "decode_ms": decode_s * 1e3 / (count - 1) if count > 1 else None,
    }


def wait_until(moment: float) -> float:
    """Sleep until ``time.perf_counter()`` is there; returns when it was reached, which is ``moment`` if it was late."""
    remaining_s = moment - time.perf_counter()
    if remaining_s <= 0:
        return moment
    time.sleep(remaining_s)
    return time.perf_counter()


def main(arguments: Sequence[str]) -> None:
    """Serve requests until standard input ends."""
    path, threads, context = arguments
    # Libraries print to standard output too: the replies get a descriptor of their own.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    engine = PromptReuse(Path(path), int(threads), int(context))
    print(json.dumps({"version": engine.version}), file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(hear(engine, json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
