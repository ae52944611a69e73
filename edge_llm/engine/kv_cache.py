"""The static KV cache: allocated once at start, its rows lent to sequences, nothing allocated or copied in a step."""

from __future__ import annotations

import contextlib
import itertools
import math
import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edge_llm.engine.tensors import bind_array
from edge_llm.errors import NoFreeSlotError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

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
        self.num_layers = dims.num_layers
        self._allocate()

    def _allocate(self) -> None:
        self.layers: list[tuple[NDArray[np.floating], NDArray[np.floating]]] = [
            (lazy_zeros(self.shape, self.dtype), lazy_zeros(self.shape, self.dtype)) for _ in range(self.num_layers)
        ]

    @property
    def slots(self) -> int:
        """Number of rows."""
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole cache once every slot has been filled."""
        return self.slots * self.max_seq_len * self.token_nbytes

    @property
    def token_nbytes(self) -> int:
        """Bytes of one position in one slot."""
        _, heads, _, head_dim = self.shape
        return 2 * self.num_layers * heads * head_dim * self.dtype.itemsize

    def bind(self, bind: Callable[..., None], names: Callable[[int], tuple[str, str]], first: int, count: int) -> None:
        """Bind neighbouring rows of every layer by address.

        Args:
            bind: of a binding: ``bind_input`` or ``bind_output``.
            names: gives the names of a layer's keys and values.
            first: the lowest row.
            count: how many.
        """
        for layer, pair in enumerate(self.layers):
            for name, buffer in zip(names(layer), pair, strict=True):
                bind_array(bind, name, buffer[first : first + count])

    def read(self, layer: int, part: int, slot: int, start: int, stop: int) -> NDArray[np.floating]:
        """Positions of one slot's keys (part 0) or values (1): ``(kv_heads, tokens, head_dim)``, perhaps a view."""
        return self.layers[layer][part][slot, :, start:stop]

    def write(self, layer: int, part: int, slot: int, start: int, rows: NDArray[np.floating]) -> None:
        """Put what ``read`` has returned into a slot, from position ``start`` on."""
        self.layers[layer][part][slot, :, start : start + rows.shape[1]] = rows

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of one slot over another's."""
        for layer, part in self._parts():
            self.write(layer, part, target, 0, self.read(layer, part, source, 0, length))

    def read_rows(self, slot: int, start: int, stop: int) -> NDArray[np.floating]:
        """A copy of the positions ``start`` to ``stop`` of a slot: ``(tokens, layers, 2, kv_heads, head_dim)``."""
        _, heads, _, head_dim = self.shape
        rows: NDArray[np.floating] = lazy_zeros((stop - start, self.num_layers, 2, heads, head_dim), self.dtype)
        for layer, part in self._parts():
            rows[:, layer, part] = self.read(layer, part, slot, start, stop).transpose(1, 0, 2)
        return rows

    def write_rows(self, slot: int, start: int, rows: NDArray[np.floating]) -> None:
        """Put what ``read_rows`` has returned into a slot, from position ``start`` on."""
        for layer, part in self._parts():
            self.write(layer, part, slot, start, rows[:, layer, part].transpose(1, 0, 2))

    def _parts(self) -> Iterator[tuple[int, int]]:
        """Every layer's keys and values."""
        return itertools.product(range(self.num_layers), range(2))


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
