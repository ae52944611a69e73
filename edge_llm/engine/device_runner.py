"""``Runner`` on a GPU: the cache, what a step reads and what it writes stay on the device, at fixed addresses.

A token costs two or three small copies up (its id, the length, its position), one run, which ends when the device has
done it, and one small copy down (the next id); each is waited for. A row of logits is fetched only when a sampler asks.

With the CUDA provider's option ``enable_cuda_graph`` a decode step is captured the first time and replayed from then
on. What that asks for is in docs/architecture.md; export/graph/check.py sees to the graph's part.

Never run on hardware: the tests run it on tensors of the processor, by the same calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import onnxruntime as ort

from edge_llm.bundle import graph_io
from edge_llm.device.session import CPU_PROVIDER, Provider, tensor_device
from edge_llm.engine.device_cache import DeviceKVCache
from edge_llm.engine.runner import Runner
from edge_llm.engine.tensors import DeviceTensor, bind_array
from edge_llm.errors import ProviderError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from edge_llm.bundle.manifest import ModelDims
    from edge_llm.engine.kv_cache import KVCache

# Of ONNX Runtime's run options: which captured graph a run is; it keeps 0 for itself, and -1 captures nothing.
_GRAPH_ID: Final = "gpu_graph_id"
_NOT_CAPTURED: Final = "-1"
# A captured graph holds memory until its session goes; what is left over runs without.
_MAX_GRAPHS: Final = 32
# Replayed kernels are those that were captured, so the results differ by nothing, or by whole units.
_REPLAY_TOLERANCE: Final = 0.05


class _Step(NamedTuple):
    """A bound decode step, and the options that it is run with."""

    binding: Any
    options: Any


class DeviceRunner(Runner):
    """Runs a graph over rows of a KV cache on the device; the interface is ``Runner``'s.

    Args:
        graph_path: the bundle's model.
        dims: the model's shape.
        slots: rows of the KV cache.
        threads: threads of what is left to the processor.
        provider: what runs it; its option ``enable_cuda_graph`` has decode steps captured.
        kv_dtype: the cache's element type.
        context: positions of a row that are used, if fewer than it has.

    Raises:
        ProviderError: ONNX Runtime cannot load the graph, the device has no memory for the cache, or a captured step
            does not compute what the same step computes without.
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
        super().__init__(
            graph_path, dims, slots=slots, threads=threads, provider=provider, kv_dtype=kv_dtype, context=context
        )
        device = tensor_device(self.session, provider)
        # The arrays are filled as the processor's runner fills them, and copied over before a step.
        self._arrays: dict[str, NDArray[Any]] = {
            graph_io.INPUT_IDS: self._input_ids,
            graph_io.SEQLENS_K: self._seqlens_k,
        }
        if self._takes_positions:
            self._arrays[graph_io.POSITION_IDS] = self._position_ids
        self._inputs = {name: DeviceTensor.allocate(array, device) for name, array in self._arrays.items()}
        self._row_index = DeviceTensor.allocate(self._first_row, device)
        # Attention reads it on the processor while it is captured, and never again: the longest row that there can be.
        self._longest_row = np.asarray(dims.max_seq_len, np.int32)
        self._device_logits = DeviceTensor.allocate(self._logits, device)
        self._device_next_ids = DeviceTensor.allocate(self._next_ids, device)
        self._logits_rows = [
            self._device_logits.part(self.session, graph_io.LOGITS, row * dims.vocab_size, (dims.vocab_size,))
            for row in range(slots)
        ]
        self._captures = provider.captures_graphs
        self._not_captured = _run_options(_NOT_CAPTURED)
        if self._captures:
            self._check_capture()

    def logits(self, row: int) -> NDArray[np.float32]:
        """Logits ``(vocab,) float32`` of a row of the last ``decode`` or ``prefill``, fetched from the device."""
        return self._logits_rows[row].read()

    def _make_cache(self, slots: int, kv_dtype: str) -> KVCache:
        return DeviceKVCache(self.session, tensor_device(self.session, self._provider), self.dims, slots, kv_dtype)

    def _bind_decode(self, first_slot: int, batch: int) -> _Step:
        binding = self.session.io_binding()
        self._bind_cache(binding, first_slot, batch)
        for name, tensor in self._inputs.items():
            tensor.bind(binding.bind_input, name, 0, batch)
        self._row_index.bind(binding.bind_input, graph_io.LOGIT_INDICES, 0, 1)
        bind_array(binding.bind_input, graph_io.TOTAL_SEQUENCE_LENGTH, self._longest_row)
        self._bind_outputs(binding, batch)
        # Other rows are other addresses, so they are another graph.
        graph_number = len(self._decode_bindings) + 1
        if not self._captures or graph_number > _MAX_GRAPHS:
            return _Step(binding, self._not_captured)
        return _Step(binding, _run_options(str(graph_number)))

    def _bind_outputs(self, binding: Any, batch: int) -> None:
        self._device_logits.bind(binding.bind_output, graph_io.LOGITS, 0, batch)
        self._device_next_ids.bind(binding.bind_output, graph_io.NEXT_TOKEN_IDS, 0, batch)

    def _run_step(self, step: _Step) -> None:
        for name, tensor in self._inputs.items():
            tensor.update(self._arrays[name])
        self.session.run_with_iobinding(step.binding, step.options)

    def _run_chunk(self, binding: Any) -> None:
        self.session.run_with_iobinding(binding, self._not_captured)

    def _read_next_ids(self) -> NDArray[np.int64]:
        return self._device_next_ids.read()

    def _check_capture(self) -> None:
        """See that a captured step reads what is fed to it, and answers as the same step that is not captured.

        ONNX Runtime runs the first one several times over, which is harmless: each writes the same keys and values.
        """
        # Two steps: the first is captured and the second replayed, with another token at another position.
        steps = [(1, 0), (self.dims.vocab_size - 1, 1)]
        results = []
        try:
            for self._captures in (False, True):
                self._decode_bindings.clear()
                for token_id, past_len in steps:
                    self.decode(0, [token_id], [past_len])
                    results.append(self.logits(0).copy())
        except Exception as error:  # ONNX Runtime raises bare pybind classes
            reason = str(error).strip().splitlines()[0]
            raise ProviderError(f"decode steps cannot be captured, set enable_cuda_graph = false: {reason}") from None
        plain, captured = results[:2], results[2:]
        if not np.allclose(plain, captured, rtol=0.0, atol=_REPLAY_TOLERANCE):
            raise ProviderError("captured decode steps answer otherwise than others, set enable_cuda_graph = false")


def _run_options(graph_id: str) -> Any:
    options = ort.RunOptions()
    options.add_run_config_entry(_GRAPH_ID, graph_id)
    return options
