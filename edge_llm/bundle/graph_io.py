"""Names of every graph's inputs and outputs, shared by the exporter and the runners.

Form ``gqa`` (one graph for everything). Inputs (``batch`` and ``seq`` are symbolic, everything else is static):

====================================  ============================================  =======
``input_ids``                         ``(batch, seq)``                              int64
``position_ids`` (GPT-2 only)         ``(batch, seq)``                              int64
``seqlens_k``                         ``(batch,)`` last valid cache index           int32
``total_sequence_length``             ``()`` longest row, cached and new            int32
``logit_indices``                     ``(n,)`` which of the ``seq`` rows reach the head  int64
``past_key.{layer}``                  ``(batch, kv_heads, max_seq_len, head_dim)``  kv dtype
``past_value.{layer}``                the same                                      kv dtype
====================================  ============================================  =======

``total_sequence_length`` may as well be ``max_seq_len`` every time, as a captured CUDA graph needs it: on the CPU
provider the results are the same bits. Only several new tokens of several rows at once, which nobody asks for, need
the true one.

Outputs: ``logits (batch, n, vocab) float32``, ``next_token_ids (batch, n) int64`` (the arg max of ``logits``), and
``present_key.{layer}`` / ``present_value.{layer}``, which the runner binds to the addresses of the past ones.

The static forms are two graphs, of one token and of one prefill chunk, that share their weights. With ``tokens`` for 1
or the chunk, their inputs are:

====================================  ============================================  =======
``input_ids``, ``position_ids``       ``(1, tokens)`` neighbouring positions        int64
``write_index`` (``scatter`` only)    ``(1,)`` the first of those positions         int64
``logit_indices``                     ``(1,)`` which of the tokens reaches the head int64
``past_key.{layer}``                  ``(1, kv_heads, max_seq_len, head_dim)``      kv dtype
``past_value.{layer}``                the same                                      kv dtype
====================================  ============================================  =======

and their outputs ``logits (1, 1, vocab) float32``, ``next_token_ids (1, 1) int64``, and

- ``scatter``: ``present_key.{layer}`` / ``present_value.{layer}``, at the addresses of the past ones;
- ``primitive``: ``new_key.{layer}`` / ``new_value.{layer} (1, kv_heads, tokens, head_dim)``, which the runner copies
  into the cache; the past is only read.

A chunk with fewer tokens is padded behind them. That is harmless: a token sees only positions up to its own, so no
real token sees the padding; and a position behind the valid ones, where ``scatter`` writes the padding's keys and
values, is overwritten by its own token before any token can see it. The padding must only be finite, since a
probability of 0 times infinity is no number: it repeats the last token.
"""

from __future__ import annotations

from typing import Final

INPUT_IDS: Final = "input_ids"
POSITION_IDS: Final = "position_ids"
SEQLENS_K: Final = "seqlens_k"
TOTAL_SEQUENCE_LENGTH: Final = "total_sequence_length"
WRITE_INDEX: Final = "write_index"
LOGIT_INDICES: Final = "logit_indices"
LOGITS: Final = "logits"
NEXT_TOKEN_IDS: Final = "next_token_ids"


def past_names(layer: int) -> tuple[str, str]:
    """Input names of one layer's key and value cache."""
    return f"past_key.{layer}", f"past_value.{layer}"


def present_names(layer: int) -> tuple[str, str]:
    """Output names of one layer's key and value cache."""
    return f"present_key.{layer}", f"present_value.{layer}"


def new_names(layer: int) -> tuple[str, str]:
    """Output names of the new rows of one layer's key and value cache."""
    return f"new_key.{layer}", f"new_value.{layer}"
