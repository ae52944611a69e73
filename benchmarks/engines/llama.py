"""llama.cpp through llama-cpp-python's low-level functions: its high-level class adds Python time to every token."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import llama_cpp
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from benchmarks.engines import OnToken


class LlamaCppEngine:
    """A context for one sequence.

    Args:
        path: a GGUF file.
        threads: for prompts and for decoding.
        context: positions of its cache.
        flash_attention: which of its two ways to attend; either may be the faster one.
    """

    def __init__(self, path: Path, threads: int, context: int, *, flash_attention: bool) -> None:
        self.version = f"{llama_cpp.__version__} (llama-cpp-python)"
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path.name}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = context
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = int(flash_attention)
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp cannot make a context")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)

    def generate(self, prompt_ids: Sequence[int], count: int, on_token: OnToken) -> None:
        """One batch for the prompt, then one token a batch."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)
        token_id = self._decode(prompt_ids, 0)
        on_token(token_id)
        for position in range(len(prompt_ids), len(prompt_ids) + count - 1):
            token_id = self._decode([token_id], position)
            on_token(token_id)

    def _decode(self, token_ids: Sequence[int], past_len: int) -> int:
        """Append tokens; returns the most likely next one."""
        batch: Any = self._batch
        batch.n_tokens = last = len(token_ids)
        for index, token_id in enumerate(token_ids):
            batch.token[index] = token_id
            batch.pos[index] = past_len + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = index == last - 1
        status = llama_cpp.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        logits = llama_cpp.llama_get_logits_ith(self._context, -1)
        row = (ctypes.c_float * self._vocab_size).from_address(ctypes.addressof(logits.contents))
        return int(np.frombuffer(row, np.float32).argmax())


def load(path: Path, threads: int, context: int) -> LlamaCppEngine:
    """Load a GGUF file, without flash attention."""
    return LlamaCppEngine(path, threads, context, flash_attention=False)


def load_flash(path: Path, threads: int, context: int) -> LlamaCppEngine:
    """Load a GGUF file, with flash attention."""
    return LlamaCppEngine(path, threads, context, flash_attention=True)
