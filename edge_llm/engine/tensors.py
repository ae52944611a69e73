"""Tensors at fixed addresses that a session reads and writes: arrays of the processor, or memory of a device.

What is on a device has never been run on hardware: the tests place it in the processor's memory, by the same calls.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import onnxruntime as ort

from edge_llm.errors import ProviderError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from edge_llm.device.session import Device


def bind_array(bind: Callable[..., None], name: str, array: NDArray[Any]) -> None:
    """Bind a CPU array by address; it must stay alive and contiguous as long as the binding.

    A session on a GPU copies an input there and then, and sees nothing of what is written into the array later.
    """
    assert array.flags.c_contiguous
    bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


class DeviceTensor:
    """A tensor of a device, at a fixed address. Whatever is copied to a device or from it goes through here.

    Args:
        value: what holds it.
        shape: its dimensions.
        dtype: its element type.
        device: where it lies.
    """

    def __init__(self, value: Any, shape: tuple[int, ...], dtype: np.dtype[Any], device: Device) -> None:
        self.shape, self.dtype = shape, dtype
        self._value, self._device = value, device

    @classmethod
    def allocate(cls, values: NDArray[Any], device: Device) -> DeviceTensor:
        """A tensor that holds ``values`` at first. Raises ``ProviderError`` if the device has no room for it."""
        try:
            value = ort.OrtValue.ortvalue_from_shape_and_type(values.shape, values.dtype.type, *device)
            value.update_inplace(values)
        except Exception as error:  # ONNX Runtime raises bare RuntimeErrors
            reason = str(error).strip().splitlines()[0]
            raise ProviderError(f"{values.nbytes} bytes cannot be had on {device.kind}: {reason}") from None
        return cls(value, values.shape, values.dtype, device)

    def update(self, values: NDArray[Any]) -> None:
        """Copy values of the same shape into it; they are there when this returns."""
        self._value.update_inplace(values)

    def read(self) -> NDArray[Any]:
        """The whole of it: a copy, or, where the device is the processor, perhaps a view."""
        values: NDArray[Any] = self._value.numpy()
        return values

    def bind(self, bind: Callable[..., None], name: str, first: int, count: int) -> None:
        """Bind neighbouring rows of it by address; it must stay alive as long as the binding."""
        row = self.shape[1:]
        self._bind(bind, name, first * math.prod(row), (count, *row))

    def part(self, session: Any, name: str, offset: int, shape: tuple[int, ...]) -> DeviceTensor:
        """A piece of it, which it must outlive.

        onnxruntime has no slices; but a tensor that is bound as an output comes back as a value without a run.

        Args:
            session: any that has the output.
            name: an output of this element type.
            offset: elements before the piece.
            shape: of the piece, whose elements lie side by side.
        """
        binding = session.io_binding()
        self._bind(binding.bind_output, name, offset, shape)
        (value,) = binding.get_outputs()
        return DeviceTensor(value, shape, self.dtype, self._device)

    def _bind(self, bind: Callable[..., None], name: str, offset: int, shape: tuple[int, ...]) -> None:
        address = self._value.data_ptr() + offset * self.dtype.itemsize
        bind(name, *self._device, self.dtype.type, shape, address)
