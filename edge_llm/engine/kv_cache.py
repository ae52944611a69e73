"""The static KV cache: allocated once at start, its rows lent to sequences, nothing allocated or copied in a step."""

from __future__ import annotations

import contextlib
import math
import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

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
            (lazy_zeros(self.shape, self.dtype), lazy_zeros(self.shape, self.dtype)) for _ in range(dims.num_layers)
        ]

    @property
    def slots(self) -> int:
        """Number of rows."""
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole cache once every slot has been filled."""
        return sum(key.nbytes + value.nbytes for key, value in self.layers)

    @property
    def token_nbytes(self) -> int:
        """Bytes of one position in one slot."""
        _, heads, _, head_dim = self.shape
        return 2 * len(self.layers) * heads * head_dim * self.dtype.itemsize

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of one slot over another's."""
        for pair in self.layers:
            for buffer in pair:
                buffer[target, :, :length] = buffer[source, :, :length]

    def read_rows(self, slot: int, start: int, stop: int) -> NDArray[np.floating]:
        """A copy of the positions ``start`` to ``stop`` of a slot: ``(tokens, layers, 2, kv_heads, head_dim)``."""
        _, heads, _, head_dim = self.shape
        rows: NDArray[np.floating] = lazy_zeros((stop - start, len(self.layers), 2, heads, head_dim), self.dtype)
        for layer, pair in enumerate(self.layers):
            for part, buffer in enumerate(pair):
                rows[:, layer, part] = buffer[slot, :, start:stop].transpose(1, 0, 2)
        return rows

    def write_rows(self, slot: int, start: int, rows: NDArray[np.floating]) -> None:
        """Put what ``read_rows`` has returned into a slot, from position ``start`` on."""
        stop = start + len(rows)
        for layer, pair in enumerate(self.layers):
            for part, buffer in enumerate(pair):
                buffer[slot, :, start:stop] = rows[:, layer, part].transpose(1, 0, 2)


def lazy_zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Zeros whose pages become resident one by one, as they are written, and go back to the system when it is freed.

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


@dataclass
class SlotContent:
    """What a free row of the cache still holds.

    Attributes:
        owner: the user whose words these are; None if they are everybody's.
        token_ids: the tokens whose keys and values are in the row, all of them computed by prefill.
        origin: ``slot`` if an answer left it there, ``partial`` if it was prefilled ahead of a query.
        saved_len: how many of the leading tokens have been in the prefix cache as well.
        prefetched_from: the tokens from this one on were computed ahead of a query that has not come yet.
        used_at: of the pool's clock; the smallest is given up first.
        expires_at: ``time.monotonic()`` seconds, or None.
    """

    owner: str | None
    token_ids: list[int]
    origin: Literal["slot", "partial"] = "slot"
    saved_len: int = 0
    prefetched_from: int | None = None
    used_at: int = 0
    expires_at: float | None = None


class SlotPool:
    """Which rows of the cache are taken, and what the free ones still hold.

    Rows are handed out lowest first, so that neighbours fill up, unless the caller wants a certain one for its content.
    """

    def __init__(self, slots: int) -> None:
        self._free = set(range(slots))
        self._slots = slots
        self._contents: dict[int, SlotContent] = {}
        self._clock = 0

    @property
    def free_count(self) -> int:
        """Rows that nobody holds."""
        return len(self._free)

    @property
    def count(self) -> int:
        """Rows, free or not."""
        return self._slots

    @property
    def free_slots(self) -> list[int]:
        """Rows that nobody holds, lowest first."""
        return sorted(self._free)

    def content(self, slot: int) -> SlotContent | None:
        """What a free row still holds, or None."""
        return self._contents.get(slot)

    def contents(self) -> list[tuple[int, SlotContent]]:
        """The free rows that still hold something, lowest first."""
        return sorted(self._contents.items(), key=lambda held: held[0])

    def forget_all(self) -> None:
        """What the free rows hold is worth nothing any more."""
        self._contents.clear()

    def forget(self, slot: int) -> None:
        """What a free row holds is worth nothing any more."""
        self._contents.pop(slot, None)

    def acquire(self, slot: int | None = None) -> int:
        """Take a free row, the lowest if none is named. Raises ``NoFreeSlotError`` if there is none."""
        if not self._free:
            raise NoFreeSlotError(f"all {self._slots} slots are taken")
        if slot is None:
            slot = min(self._free)
        self._free.remove(slot)
        self._contents.pop(slot, None)
        return slot

    def release(self, slot: int, content: SlotContent | None = None) -> None:
        """Give a row back, with what it holds from now on."""
        assert slot not in self._free, f"slot {slot} released twice"
        self._free.add(slot)
        if content is not None and content.token_ids:
            self._clock += 1
            content.used_at = self._clock
            self._contents[slot] = content

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
        """Book a held row as moved into a free one, whose content is overwritten."""
        self._free.remove(target)
        self._contents.pop(target, None)
        self._free.add(source)
