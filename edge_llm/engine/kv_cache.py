"""The static KV cache: allocated once at start, its rows lent to sequences, nothing allocated or copied in a step."""

from __future__ import annotations

import contextlib
import math
import mmap
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_llm.errors import NoFreeSlotError

if TYPE_CHECKING:
    from collections.abc import Collection

    from numpy.typing import NDArray

    from edge_llm.bundle.manifest import ModelDims


class KVCache:
    """Keys and values of every layer, each ``(slots, kv_heads, max_seq_len, head_dim)``.

    A slot is a row. Its valid length belongs to the sequence that holds it, so rewinding is a smaller length. The
    system hands out zeroed pages on first touch: memory grows with the longest sequence that a slot has held, up to
    ``nbytes``.

    Args:
        dims: the model's shape.
        slots: number of rows.
        dtype: ``float32`` or ``float16``, as the graph wants.
    """

    def __init__(self, dims: ModelDims, slots: int, dtype: str = "float32") -> None:
        self.shape = (slots, dims.num_kv_heads, dims.max_seq_len, dims.head_dim)
        self.dtype = np.dtype(dtype)
        self.max_seq_len = dims.max_seq_len
        self.layers: list[tuple[NDArray[np.floating], NDArray[np.floating]]] = [
            (_lazy_zeros(self.shape, self.dtype), _lazy_zeros(self.shape, self.dtype)) for _ in range(dims.num_layers)
        ]

    @property
    def slots(self) -> int:
        """Number of rows."""
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole cache once every slot has been filled."""
        return sum(key.nbytes + value.nbytes for key, value in self.layers)

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of one slot over another's."""
        for pair in self.layers:
            for buffer in pair:
                buffer[target, :, :length] = buffer[source, :, :length]


def _lazy_zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Zeros whose pages become resident one by one, as they are written.

    ``np.zeros`` would ask the kernel for huge pages: a slot's heads lie ``max_seq_len * head_dim`` elements apart, so
    the first tokens of one sequence would make the whole slot resident.
    """
    # Private, so that it counts as the process's own memory, which it is.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=flags)
    # A kernel built without huge pages refuses the advice, and does not need it.
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype).reshape(shape)


class SlotPool:
    """Which rows of the cache are taken. Rows are handed out lowest first, so that neighbours fill up."""

    def __init__(self, slots: int) -> None:
        self._free = set(range(slots))
        self._slots = slots

    @property
    def free_count(self) -> int:
        """Rows that nobody holds."""
        return len(self._free)

    def acquire(self) -> int:
        """Take the lowest free row. Raises ``NoFreeSlotError`` if there is none."""
        if not self._free:
            raise NoFreeSlotError(f"all {self._slots} slots are taken")
        slot = min(self._free)
        self._free.remove(slot)
        return slot

    def release(self, slot: int) -> None:
        """Give a row back."""
        assert slot not in self._free, f"slot {slot} released twice"
        self._free.add(slot)

    def compaction(self, rows: Collection[int]) -> list[tuple[int, int]]:
        """Moves ``(source, target)`` into free rows that make ``rows`` neighbours, as few as possible.

        Returns an empty list when they are neighbours already, or when rows in between are held by others.
        """
        count = len(rows)
        windows = [range(start, start + count) for start in range(self._slots - count + 1)]
        usable = [window for window in windows if all(row in rows or row in self._free for row in window)]
        if not usable:
            return []
        window = max(usable, key=lambda candidate: sum(row in rows for row in candidate))
        outside = [row for row in sorted(rows) if row not in window]
        holes = [row for row in window if row not in rows]
        return list(zip(outside, holes, strict=True))

    def move(self, source: int, target: int) -> None:
        """Book a held row as moved into a free one."""
        self._free.remove(target)
        self._free.add(source)
