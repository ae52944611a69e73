"""One ONNX Runtime session over the static cache: every buffer is bound once, a step only rewrites their contents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from edge_llm.bundle import graph_io
from edge_llm.device.session import CPU_PROVIDER, Provider, make_session, session_options
from edge_llm.engine.kv_cache import KVCache
from edge_llm.engine.tensors import bind_array
from edge_llm.errors import ContextOverflowError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edge_llm.bundle.manifest import ModelDims


class ModelRunner(Protocol):
    """What the engine asks of a runner: this file's ``Runner`` documents each, static_runner.py has the other one.

    Attributes:
        dims: the model's shape.
        max_seq_len: positions of a row that are used.
        cache: its rows are the slots.
        session: runs the decode steps.
    """

    dims: ModelDims
    max_seq_len: int
    cache: KVCache
    session: Any

    @property
    def sessions(self) -> tuple[Any, ...]:
        """Every ONNX Runtime session that it runs."""

    def decode(self, first_slot: int, token_ids: Sequence[int], past_lens: Sequence[int]) -> NDArray[np.int64]:
        """Append one token to each of neighbouring slots."""

    def logits(self, row: int) -> NDArray[np.float32]:
        """Logits of a row of the last ``decode`` or ``prefill``."""

    def prefill(self, slot: int, token_ids: Sequence[int], past_len: int) -> int:
        """Append several tokens to one slot; returns the most likely token after the last one."""

    def forward(
        self, slot: int, token_ids: Sequence[int], past_len: int, logit_indices: Sequence[int]
    ) -> NDArray[np.float32]:
        """Append tokens to one slot and return the logits after chosen ones of them."""


class Runner:
    """Runs a graph over rows of its KV cache.

    The past and the present of every layer are bound to the same address, so the graph appends in place
    (edge_llm/bundle/graph_io.py names the inputs and outputs).

    Args:
        graph_path: the model, either a bundle's or a prepared copy.
        dims: the model's shape.
        slots: rows of the KV cache.
        threads: threads within an operator; 0 is one per physical core.
        provider: what runs it.
        kv_dtype: the cache's element type.
        context: positions of a row that are used, if fewer than it has.

    Raises:
        ProviderError: ONNX Runtime cannot load the graph.
    """

    def __init__(
        self,
        graph_path: Path,
        dims: ModelDims,
        *,
        slots: int = 1,
        threads: int = 0,
        provider: Provider = CPU_PROVIDER,
        kv_dtype: str = "float32",
        context: int | None = None,
    ) -> None:
        self.dims = dims
        self.max_seq_len = min(dims.max_seq_len, context or dims.max_seq_len)
        self._provider = provider
        self.session = make_session(graph_path, session_options(threads), provider)
        self.cache = self._make_cache(slots, kv_dtype)
        self._takes_positions = graph_io.POSITION_IDS in {node.name for node in self.session.get_inputs()}
        # One row per slot; a step over fewer rows binds the head of each buffer.
        self._input_ids = np.zeros((slots, 1), np.int64)  # (batch, seq)
        self._position_ids = np.zeros((slots, 1), np.int64)  # (batch, seq)
        self._seqlens_k = np.zeros(slots, np.int32)  # (batch,)
        self._total_len = np.zeros((), np.int32)
        self._first_row = np.zeros(1, np.int64)  # logit_indices of a decode step
        self._logits = np.zeros((slots, 1, dims.vocab_size), np.float32)  # (batch, n, vocab)
        self._next_ids = np.zeros((slots, 1), np.int64)  # (batch, n)
        self._decode_bindings: dict[tuple[int, int], Any] = {}
        self._prefill_bindings: dict[int, Any] = {}

    @property
    def sessions(self) -> tuple[Any, ...]:
        """The one session."""
        return (self.session,)

    def decode(self, first_slot: int, token_ids: Sequence[int], past_lens: Sequence[int]) -> NDArray[np.int64]:
        """Append one token to each of neighbouring slots, in one run.

        Args:
            first_slot: the lowest row; the batch is rows ``first_slot`` to ``first_slot + len(token_ids) - 1``.
            token_ids: one token a row.
            past_lens: how many positions of each row are valid before the step.

        Returns:
            The most likely next tokens ``(batch,) int64``: a view, valid until the next run, as is ``logits``.
        """
        batch = len(token_ids)
        longest = check_step(past_lens, self.max_seq_len)
        binding = self._decode_bindings.get((first_slot, batch))
        if binding is None:
            binding = self._decode_bindings[first_slot, batch] = self._bind_decode(first_slot, batch)
        self._input_ids[:batch, 0] = token_ids
        self._position_ids[:batch, 0] = past_lens
        self._seqlens_k[:batch] = past_lens
        self._total_len[()] = longest + 1
        self._run_step(binding)
        return self._read_next_ids()[:batch, 0]

    def logits(self, row: int) -> NDArray[np.float32]:
        """Logits ``(vocab,) float32`` of a row of the last ``decode`` or ``prefill``: a view until the next run."""
        return cast("NDArray[np.float32]", self._logits[row, 0])

    def prefill(self, slot: int, token_ids: Sequence[int], past_len: int) -> int:
        """Append several tokens to one slot; returns the most likely token after the last one.

        Args:
            slot: the row.
            token_ids: one or more tokens.
            past_len: how many positions of the row are valid before.
        """
        binding = self._bind_prefill(slot, token_ids, past_len, [len(token_ids) - 1])
        self._bind_outputs(binding, 1)
        self._run_chunk(binding)
        return int(self._read_next_ids()[0, 0])

    def forward(
        self, slot: int, token_ids: Sequence[int], past_len: int, logit_indices: Sequence[int]
    ) -> NDArray[np.float32]:
        """Append tokens to one slot and return the logits after chosen ones of them.

        Args:
            slot: the row.
            token_ids: one or more tokens.
            past_len: how many positions of the row are valid before.
            logit_indices: which of the new tokens' logits to compute.

        Returns:
            ``(len(logit_indices), vocab) float32``, the caller's own.
        """
        binding = self._bind_prefill(slot, token_ids, past_len, logit_indices)
        count = len(logit_indices)
        logits = np.empty((1, count, self.dims.vocab_size), np.float32)
        next_ids = np.empty((1, count), np.int64)
        bind_array(binding.bind_output, graph_io.LOGITS, logits)
        bind_array(binding.bind_output, graph_io.NEXT_TOKEN_IDS, next_ids)
        self._run_chunk(binding)
        return cast("NDArray[np.float32]", logits[0])

    def _make_cache(self, slots: int, kv_dtype: str) -> KVCache:
        return KVCache(self.dims, slots, kv_dtype)

    def _run_step(self, binding: Any) -> None:
        """Run what ``_bind_decode`` has bound."""
        self.session.run_with_iobinding(binding)

    def _run_chunk(self, binding: Any) -> None:
        """Run what ``_bind_prefill`` has bound."""
        self.session.run_with_iobinding(binding)

    def _read_next_ids(self) -> NDArray[np.int64]:
        """``(slots, 1)``: the last run's come first."""
        return self._next_ids

    def _bind_decode(self, first_slot: int, batch: int) -> Any:
        binding = self.session.io_binding()
        self._bind_cache(binding, first_slot, batch)
        bind_array(binding.bind_input, graph_io.INPUT_IDS, self._input_ids[:batch])
        if self._takes_positions:
            bind_array(binding.bind_input, graph_io.POSITION_IDS, self._position_ids[:batch])
        bind_array(binding.bind_input, graph_io.SEQLENS_K, self._seqlens_k[:batch])
        bind_array(binding.bind_input, graph_io.TOTAL_SEQUENCE_LENGTH, self._total_len)
        bind_array(binding.bind_input, graph_io.LOGIT_INDICES, self._first_row)
        self._bind_outputs(binding, batch)
        return binding

    def _bind_outputs(self, binding: Any, batch: int) -> None:
        bind_array(binding.bind_output, graph_io.LOGITS, self._logits[:batch])
        bind_array(binding.bind_output, graph_io.NEXT_TOKEN_IDS, self._next_ids[:batch])

    def _bind_prefill(self, slot: int, token_ids: Sequence[int], past_len: int, logit_indices: Sequence[int]) -> Any:
        count = len(token_ids)
        check_chunk(past_len, count, self.max_seq_len)
        binding = self._prefill_bindings.get(slot)
        if binding is None:
            binding = self._prefill_bindings[slot] = self.session.io_binding()
            self._bind_cache(binding, slot, 1)
        # These are copied by the binding: their shape changes with the chunk.
        binding.bind_cpu_input(graph_io.INPUT_IDS, np.asarray([token_ids], np.int64))
        if self._takes_positions:
            positions = np.arange(past_len, past_len + count, dtype=np.int64)
            binding.bind_cpu_input(graph_io.POSITION_IDS, positions[None])
        binding.bind_cpu_input(graph_io.SEQLENS_K, np.asarray([past_len + count - 1], np.int32))
        binding.bind_cpu_input(graph_io.TOTAL_SEQUENCE_LENGTH, np.asarray(past_len + count, np.int32))
        binding.bind_cpu_input(graph_io.LOGIT_INDICES, np.asarray(logit_indices, np.int64))
        return binding

    def _bind_cache(self, binding: Any, first_slot: int, batch: int) -> None:
        self.cache.bind(binding.bind_input, graph_io.past_names, first_slot, batch)
        self.cache.bind(binding.bind_output, graph_io.present_names, first_slot, batch)


def check_step(past_lens: Sequence[int], max_seq_len: int) -> int:
    """The longest row of a decode step. Raises ``ContextOverflowError`` if it has no room for one more token."""
    longest = max(past_lens)
    if longest >= max_seq_len:
        raise ContextOverflowError(f"slot is full: {longest} of {max_seq_len} positions")
    return longest


def check_chunk(past_len: int, count: int, max_seq_len: int) -> None:
    """Raises ``ContextOverflowError`` if ``count`` more tokens do not fit behind ``past_len``."""
    if past_len + count > max_seq_len:
        raise ContextOverflowError(f"{past_len} + {count} tokens do not fit into {max_seq_len} positions")
