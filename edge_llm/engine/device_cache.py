"""The static KV cache in the memory of a device. Never run on hardware: see edge_llm/engine/tensors.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edge_llm.bundle import graph_io
from edge_llm.engine.kv_cache import KVCache
from edge_llm.engine.tensors import DeviceTensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from edge_llm.bundle.manifest import ModelDims
    from edge_llm.device.session import Device


class DeviceKVCache(KVCache):
    """``KVCache`` on a device. A step copies none of it.

    Rows that are moved, saved or restored go through the processor's memory, head by head, and only the positions
    that are wanted: that is once for a prompt or a move between slots, not once for a token.

    Args:
        session: any that has the graph's outputs; it stays alive with the cache.
        device: where it lies.
        dims: the model's shape.
        slots: number of rows.
        dtype: ``float32`` or ``float16``, as the graph wants.
    """

    def __init__(self, session: Any, device: Device, dims: ModelDims, slots: int, dtype: str = "float32") -> None:
        self._session, self._device = session, device
        # Every element type of the cache has an output, whose name a view of it needs.
        names = {node.name for node in session.get_outputs()}
        self._output = next(name for name in (graph_io.present_names(0)[0], graph_io.new_names(0)[0]) if name in names)
        super().__init__(dims, slots, dtype)

    def bind(self, bind: Callable[..., None], names: Callable[[int], tuple[str, str]], first: int, count: int) -> None:
        """Bind neighbouring rows of every layer by address; see ``KVCache.bind``."""
        for layer, pair in enumerate(self._tensors):
            for name, tensor in zip(names(layer), pair, strict=True):
                tensor.bind(bind, name, first, count)

    def read(self, layer: int, part: int, slot: int, start: int, stop: int) -> NDArray[np.floating]:
        """Positions of one slot's keys or values; see ``KVCache.read``. A copy."""
        _, heads, _, head_dim = self.shape
        rows = np.empty((heads, stop - start, head_dim), self.dtype)
        for head in range(heads if stop > start else 0):
            rows[head] = self._head(layer, part, slot, head, start, stop).read()
        return rows

    def write(self, layer: int, part: int, slot: int, start: int, rows: NDArray[np.floating]) -> None:
        """Put positions into one slot's keys or values; see ``KVCache.write``."""
        heads, count, _ = rows.shape
        for head in range(heads if count else 0):
            self._head(layer, part, slot, head, start, start + count).update(np.ascontiguousarray(rows[head]))

    def _allocate(self) -> None:
        # What nobody has written must be finite: a probability of 0 times infinity is no number.
        zeros = np.zeros(self.shape, self.dtype)
        self._tensors = [
            (DeviceTensor.allocate(zeros, self._device), DeviceTensor.allocate(zeros, self._device))
            for _ in range(self.num_layers)
        ]

    def _head(self, layer: int, part: int, slot: int, head: int, start: int, stop: int) -> DeviceTensor:
        """Positions of one head, which lie side by side: ``(tokens, head_dim)``."""
        _, heads, length, head_dim = self.shape
        offset = ((slot * heads + head) * length + start) * head_dim
        return self._tensors[layer][part].part(self._session, self._output, offset, (stop - start, head_dim))
