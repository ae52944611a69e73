"""A byte tokenizer and a runner without weights, so that the loop is tested on its own (style: nanochat's mock model).

The fake's next token is a hash of every token in its row: a wrong, stale or misplaced cache gives another answer.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Mapping, Sequence
from itertools import accumulate
from types import SimpleNamespace

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from edge_llm.bundle.manifest import ModelDims, PromptTemplate, RolePieces
from edge_llm.engine.engine import Engine
from edge_llm.engine.prompt import PromptRenderer
from edge_llm.engine.tokenizer import Tokenizer
from edge_llm.errors import ContextOverflowError

SPECIAL_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
STOP_ID = 256 + SPECIAL_TOKENS.index("<|end|>")
TEMPLATE = PromptTemplate(
    prefix="",
    system=RolePieces(before="<|system|>", after="<|end|>\n"),
    user=RolePieces(before="<|user|>", after="<|end|>\n"),
    assistant=RolePieces(before="<|assistant|>", after="<|end|>\n"),
    generation_prompt="<|assistant|>",
    default_system=None,
    strip_content=False,
    special_tokens=SPECIAL_TOKENS,
    stop_token_ids=(STOP_ID,),
    stop_strings=(),
)


def byte_tokenizer(special_tokens: Sequence[str] = SPECIAL_TOKENS, merged: Sequence[str] = ()) -> Tokenizer:
    """Token id = byte for 0 to 255, then what is ``merged`` to longer and longer tokens, then the special tokens."""
    # The alphabet's order is the byte order of GPT-2's printable mapping.
    alphabet = _bytes_to_unicode()
    vocab = {alphabet[byte]: byte for byte in range(256)}
    merges: list[tuple[str, str]] = []
    for text in merged:
        pieces = [alphabet[byte] for byte in text.encode()]
        pairs = list(zip(accumulate(pieces), pieces[1:], strict=False))
        merges += [pair for pair in pairs if pair not in merges]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in special_tokens])
    return Tokenizer(backend)


def _bytes_to_unicode() -> dict[int, str]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    mapping = {byte: chr(byte) for byte in printable}
    rest = [byte for byte in range(256) if byte not in mapping]
    return mapping | {byte: chr(256 + index) for index, byte in enumerate(rest)}


class FakeRunner:
    """Stands in for engine/runner.py's Runner. With ``gate`` closed a run waits; ``fail_next`` is raised."""

    def __init__(
        self,
        slots: int = 4,
        max_seq_len: int = 256,
        stop_after: int | None = None,
        vocab_size: int = 256 + len(SPECIAL_TOKENS),
    ) -> None:
        self.dims = ModelDims(
            architecture="gpt2",
            num_layers=1,
            num_heads=1,
            num_kv_heads=1,
            head_dim=8,
            hidden_size=8,
            vocab_size=vocab_size,
            max_seq_len=max_seq_len,
        )
        self.rows = np.zeros((slots, max_seq_len), np.int64)
        self.cache = SimpleNamespace(
            slots=slots,
            copy_row=self._copy_row,
            read_rows=self._read_rows,
            write_rows=self._write_rows,
            nbytes=self.rows.nbytes,
            token_nbytes=2 * self.dims.head_dim * 4,
        )
        self.stop_after = stop_after
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.fail_next: Exception | None = None
        self.runs: list[tuple[str, int]] = []
        self.max_seq_len = max_seq_len
        self._logits = np.zeros((slots, self.dims.vocab_size), np.float32)

    def prefill(self, slot: int, token_ids: list[int], past_len: int) -> int:
        self._enter("prefill", len(token_ids))
        self._write(slot, token_ids, past_len)
        return self._next(slot, past_len + len(token_ids), 0)

    def decode(self, first_slot: int, token_ids: list[int], past_lens: list[int]) -> np.ndarray:
        self._enter("decode", len(token_ids))
        next_ids = []
        for row, (token_id, past_len) in enumerate(zip(token_ids, past_lens, strict=True)):
            self._write(first_slot + row, [token_id], past_len)
            next_ids.append(self._next(first_slot + row, past_len + 1, row))
        return np.asarray(next_ids)

    def logits(self, row: int) -> np.ndarray:
        return self._logits[row]

    def _enter(self, kind: str, count: int) -> None:
        self.runs.append((kind, count))
        self.entered.set()
        assert self.gate.wait(30), "the test never opened the gate"
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error

    def _write(self, slot: int, token_ids: list[int], past_len: int) -> None:
        if past_len + len(token_ids) > self.max_seq_len:
            raise ContextOverflowError("full")
        self.rows[slot, past_len : past_len + len(token_ids)] = token_ids

    def _next(self, slot: int, length: int, row: int) -> int:
        content = self.rows[slot, :length]
        answered = length - 1 - int(np.flatnonzero(content == 256 + 2)[-1]) if 258 in content else length
        if self.stop_after is not None and answered >= self.stop_after:
            token_id = STOP_ID
        else:
            token_id = ord("a") + zlib.crc32(content.tobytes()) % 26
        self._logits[row] = 0
        self._logits[row, token_id] = 10
        return token_id

    def _read_rows(self, slot: int, start: int, stop: int) -> np.ndarray:
        shape = (stop - start, 1, 2, 1, self.dims.head_dim)
        return np.broadcast_to(self.rows[slot, start:stop].reshape(-1, 1, 1, 1, 1), shape).astype(np.float32)

    def _write_rows(self, slot: int, start: int, rows: np.ndarray) -> None:
        self.rows[slot, start : start + len(rows)] = rows[:, 0, 0, 0, 0].astype(np.int64)

    def _copy_row(self, source: int, target: int, length: int) -> None:
        self.rows[target, :length] = self.rows[source, :length]


class ScriptedRunner(FakeRunner):
    """Answers each user text with the tokens that a test has written for it, then stops.

    Args:
        answers: token ids for each text.
        tokenizer: of prompts ``<|user|>text<|reply|>``.
    """

    def __init__(self, answers: Mapping[str, Sequence[int]], tokenizer: Tokenizer, slots: int = 3) -> None:
        super().__init__(slots, vocab_size=tokenizer.vocab_size)
        self.answers = dict(answers)
        self._tokenizer = tokenizer

    def _next(self, slot: int, length: int, row: int) -> int:
        user_id, reply_id, end_id = map(self._tokenizer.token_id, ("<|user|>", "<|reply|>", "<|end|>"))
        content = self.rows[slot, :length].tolist()
        token_id = end_id
        if reply_id in content:
            reply = content.index(reply_id)
            script = self.answers[self._tokenizer.decode(content[content.index(user_id) + 1 : reply])]
            token_id = [*script, *[end_id] * length][length - 1 - reply]
        self._logits[row] = 0
        self._logits[row, token_id] = 10
        return token_id


def fake_engine(runner: FakeRunner, prefill_chunk: int = 16) -> Engine:
    return Engine(runner, [STOP_ID], prefill_chunk)


def renderer(tokenizer: Tokenizer | None = None) -> PromptRenderer:
    return PromptRenderer(TEMPLATE, tokenizer or byte_tokenizer())
