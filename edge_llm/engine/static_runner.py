"""Two ONNX Runtime sessions of fixed shapes over the static cache: one decodes, one takes a padded prefill chunk.

edge_llm/bundle/graph_io.py describes the forms. On the CPU provider, nothing but the new rows of a ``primitive`` graph
is copied. On a GPU, cache and inputs stay on the device, at fixed addresses; each run brings its logits back, and the
new rows of a ``primitive`` graph go through the processor's memory. That has never been run on hardware.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from edge_llm.bundle import graph_io
from edge_llm.device.session import CPU, CPU_PROVIDER, Provider, make_session, session_options, tensor_device
from edge_llm.engine.device_cache import DeviceKVCache
from edge_llm.engine.kv_cache import KVCache
from edge_llm.engine.runner import check_chunk, check_step
from edge_llm.engine.tensors import DeviceTensor, bind_array

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edge_llm.bundle.manifest import ModelDims
    from edge_llm.device.session import Device


class StaticPaths(NamedTuple):
    """The two graphs of a static form; their data file lies beside them."""

    decode: Path
    prefill: Path


class StaticRunner:
    """Runs a static form over rows of its KV cache, one row at a time; the interface is ``Runner``'s.

    Args:
        paths: the graphs.
        dims: the model's shape.
        slots: rows of the KV cache.
        threads: threads within an operator; 0 is one per physical core.
        provider: what runs them.
        kv_dtype: the cache's element type.
        context: positions of a row that are used, if fewer than it has.

    Raises:
        ProviderError: ONNX Runtime cannot load a graph.
    """

    def __init__(
        self,
        paths: StaticPaths,
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
        sessions = [make_session(path, session_options(threads), provider) for path in paths]
        device = None if provider.name == CPU else tensor_device(sessions[0], provider)
        if device is None:
            self.cache = KVCache(dims, slots, kv_dtype)
        else:
            self.cache = DeviceKVCache(sessions[0], device, dims, slots, kv_dtype)
        self._decode, self._prefill = (_StaticGraph(session, self.cache, device) for session in sessions)
        self._logits = np.zeros((slots, dims.vocab_size), np.float32)
        self._next_ids = np.zeros(slots, np.int64)

    @property
    def session(self) -> Any:
        """The session of decode steps; whoever measures may put another one into its place."""
        return self._decode.session

    @session.setter
    def session(self, session: Any) -> None:
        self._decode.session = session

    @property
    def sessions(self) -> tuple[Any, ...]:
        """Those of decode and prefill."""
        return self._decode.session, self._prefill.session

    @property
    def prefill_chunk(self) -> int:
        """Tokens that one run of the prefill graph takes, padding included."""
        return self._prefill.tokens

    def decode(self, first_slot: int, token_ids: Sequence[int], past_lens: Sequence[int]) -> NDArray[np.int64]:
        """Append one token to each of neighbouring slots, in one run each; see ``Runner.decode``."""
        check_step(past_lens, self.max_seq_len)
        for row, (token_id, past_len) in enumerate(zip(token_ids, past_lens, strict=True)):
            self._decode.run(first_slot + row, [token_id], past_len, [0])
            self._take(self._decode, row)
        return self._next_ids[: len(token_ids)]

    def logits(self, row: int) -> NDArray[np.float32]:
        """Logits ``(vocab,) float32`` of a row of the last ``decode`` or ``prefill``: a view until the next run."""
        return cast("NDArray[np.float32]", self._logits[row])

    def prefill(self, slot: int, token_ids: Sequence[int], past_len: int) -> int:
        """Append several tokens to one slot, in as many chunks as it takes; see ``Runner.prefill``."""
        for graph, start, chunk in self._chunks(token_ids, past_len):
            graph.run(slot, chunk, past_len + start, [len(chunk) - 1])
        self._take(graph, row=0)
        return int(self._next_ids[0])

    def forward(
        self, slot: int, token_ids: Sequence[int], past_len: int, logit_indices: Sequence[int]
    ) -> NDArray[np.float32]:
        """Append tokens to one slot and return the logits after chosen ones; see ``Runner.forward``.

        A graph computes a fixed number of logits, so a chunk is run once for each so many that are asked for, which
        writes the same keys and values again.
        """
        wanted = np.asarray(list(logit_indices), np.int64)
        logits = np.empty((len(wanted), self.dims.vocab_size), np.float32)
        for graph, start, chunk in self._chunks(token_ids, past_len):
            (places,) = np.nonzero((wanted >= start) & (wanted < start + len(chunk)))
            for first in range(0, max(1, len(places)), graph.rows):
                some = places[first : first + graph.rows]
                graph.run(slot, chunk, past_len + start, (wanted[some] - start).tolist())
                logits[some] = graph.logits[0, : len(some)]
        return logits

    def _chunks(self, token_ids: Sequence[int], past_len: int) -> Iterator[tuple[_StaticGraph, int, Sequence[int]]]:
        """What to run, in order: the graph, the place of its first token, and its tokens."""
        count = len(token_ids)
        check_chunk(past_len, count, self.max_seq_len)
        start = 0
        while start < count:
            chunk = self._prefill
            # Padding needs room, too: a write beyond the cache's end is undefined. The last tokens go one by one.
            if count - start == 1 or past_len + start + chunk.tokens > self.dims.max_seq_len:
                chunk = self._decode
            yield chunk, start, token_ids[start : start + chunk.tokens]
            start += chunk.tokens

    def _take(self, graph: _StaticGraph, row: int) -> None:
        """Keep the logits of a run beyond the next one."""
        self._logits[row] = graph.logits[0, 0]
        self._next_ids[row] = graph.next_ids[0, 0]


class _StaticGraph:
    """One session, its input and output arrays, and a binding for each slot: all made once.

    Args:
        session: the graph's.
        cache: what it appends to.
        device: where its inputs lie; None leaves them in their arrays.

    Attributes:
        tokens: how many it takes, padding included.
        rows: of how many it computes logits.
        logits: ``(1, rows, vocab)`` float32 of the last run.
        next_ids: ``(1, rows)`` int64, their arg max.
    """

    def __init__(self, session: Any, cache: KVCache, device: Device | None) -> None:
        self.session = session
        shapes = {node.name: node.shape for node in (*session.get_inputs(), *session.get_outputs())}
        self.tokens: int = shapes[graph_io.INPUT_IDS][1]
        self.rows: int = shapes[graph_io.LOGIT_INDICES][0]
        self.logits = np.zeros(shapes[graph_io.LOGITS], np.float32)
        self.next_ids = np.zeros(shapes[graph_io.NEXT_TOKEN_IDS], np.int64)
        self._cache = cache
        self._inputs = {
            name: np.zeros(shapes[name], np.int64)
            for name in (graph_io.INPUT_IDS, graph_io.POSITION_IDS, graph_io.WRITE_INDEX, graph_io.LOGIT_INDICES)
            if name in shapes
        }
        self._device_inputs = (
            {}
            if device is None
            else {name: DeviceTensor.allocate(array, device) for name, array in self._inputs.items()}
        )
        # A form that writes the new rows beside the cache names them.
        self._new_rows = [
            tuple(np.zeros(shapes[name], cache.dtype) for name in graph_io.new_names(layer))
            for layer in range(cache.num_layers)
            if graph_io.new_names(layer)[0] in shapes
        ]
        self._bindings: dict[int, Any] = {}

    def run(self, slot: int, token_ids: Sequence[int], past_len: int, logit_indices: Sequence[int]) -> None:
        """Append up to ``tokens`` tokens to a slot and compute the logits of up to ``rows`` of them."""
        count = len(token_ids)
        self._inputs[graph_io.INPUT_IDS][0, :count] = token_ids
        # Padding is an ordinary token, so that its values are ordinary.
        self._inputs[graph_io.INPUT_IDS][0, count:] = token_ids[-1]
        self._inputs[graph_io.POSITION_IDS][0] = np.arange(past_len, past_len + self.tokens)
        if graph_io.WRITE_INDEX in self._inputs:
            self._inputs[graph_io.WRITE_INDEX][0] = past_len
        self._inputs[graph_io.LOGIT_INDICES][: len(logit_indices)] = logit_indices
        self._inputs[graph_io.LOGIT_INDICES][len(logit_indices) :] = 0
        binding = self._bindings.get(slot)
        if binding is None:
            binding = self._bindings[slot] = self._bind(slot)
        for name, tensor in self._device_inputs.items():
            tensor.update(self._inputs[name])
        self.session.run_with_iobinding(binding)
        for layer, new in enumerate(self._new_rows):
            for part, rows in enumerate(new):
                self._cache.write(layer, part, slot, past_len, rows[0, :, :count])

    def _bind(self, slot: int) -> Any:
        binding = self.session.io_binding()
        for name, array in self._inputs.items():
            if name in self._device_inputs:
                self._device_inputs[name].bind(binding.bind_input, name, 0, len(array))
            else:
                bind_array(binding.bind_input, name, array)
        bind_array(binding.bind_output, graph_io.LOGITS, self.logits)
        bind_array(binding.bind_output, graph_io.NEXT_TOKEN_IDS, self.next_ids)
        self._cache.bind(binding.bind_input, graph_io.past_names, slot, 1)
        if not self._new_rows:
            self._cache.bind(binding.bind_output, graph_io.present_names, slot, 1)
        for layer, new in enumerate(self._new_rows):
            for name, rows in zip(graph_io.new_names(layer), new, strict=True):
                bind_array(binding.bind_output, name, rows)
        return binding
