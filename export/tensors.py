"""Weights by name, read one at a time so that a checkpoint larger than memory's half can be exported."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from export.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Mapping

Float32Array: TypeAlias = NDArray[np.float32]
Shapes: TypeAlias = "Mapping[str, tuple[int, ...]]"


class Tensors(Protocol):
    """A checkpoint's weights under the names of the Hugging Face checkpoint, without the ``model.`` prefix."""

    @property
    def shapes(self) -> Shapes:
        """Shape of every tensor there is."""
        ...

    def read(self, name: str) -> Float32Array:
        """One tensor as float32. Raises ``ExportError`` if it cannot be read."""
        ...


def to_float32(array: NDArray[Any], name: str, source: str) -> Float32Array:
    """Convert a tensor as it was stored. Raises ``ExportError`` if it holds a value that is not finite."""
    values = np.asarray(array).astype(np.float32)
    if not np.isfinite(values).all():
        raise ExportError(
            f"{source}: weight {name!r} holds values that are not finite numbers: the checkpoint is damaged or its "
            f"training failed"
        )
    return values


class MemoryTensors:
    """Weights that are already in memory."""

    def __init__(self, arrays: Mapping[str, NDArray[np.floating]]) -> None:
        self._arrays = arrays

    @property
    def shapes(self) -> Shapes:
        """Shape of every tensor there is."""
        return {name: array.shape for name, array in self._arrays.items()}

    def read(self, name: str) -> Float32Array:
        """One tensor as float32."""
        return self._arrays[name].astype(np.float32)


def check_shapes(tensors: Tensors, required: Shapes, optional: Shapes, source: str) -> None:
    """Check that a checkpoint holds what its configuration promises, before any weight is read.

    Args:
        tensors: the checkpoint's weights.
        required: shapes of the tensors that must be there.
        optional: shapes of those that may be there (biases, an untied head).
        source: what to call the checkpoint in the message.

    Raises:
        ExportError: a tensor is missing, or its shape is another; the message names it.
    """
    missing = [name for name in required if name not in tensors.shapes]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ExportError(
            f"{source} lacks the weight {missing[0]!r}{more}: the checkpoint is incomplete, or its config describes "
            f"another model; download it again"
        )
    known = {None, *map(_layer_of, required)}
    for name in tensors.shapes:
        if _layer_of(name) not in known:
            raise ExportError(
                f"{source}: weight {name!r} belongs to a layer that its config does not have: the config and the "
                f"weights do not belong together"
            )
    for name, shape in {**optional, **required}.items():
        found = tensors.shapes.get(name, shape)
        if found != shape:
            raise ExportError(
                f"{source}: weight {name!r} has shape {list(found)}, its config says {list(shape)}: the config and "
                f"the weights do not belong together"
            )


def _layer_of(name: str) -> str | None:
    """``layers.3`` of ``layers.3.mlp.up_proj.weight``; None for a weight outside the layers."""
    found = re.match(r"(?:h|layers)\.\d+(?=\.)", name)
    return found.group() if found else None
