"""Weight-only quantisation in blocks, symmetric, round to nearest: the layout of ``MatMulNBits``.

Source of the layout: onnxruntime docs/ContribOperators.md, ``com.microsoft.MatMulNBits``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from export.errors import ExportError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from export.tensors import Float32Array

BLOCK_SIZES: Final = (256, 128, 64, 32, 16)
_ROWS_AT_ONCE: Final = 4096


class QuantizedWeight(NamedTuple):
    """A weight matrix in blocks along its input dimension K.

    Attributes:
        blocks: ``(N, K / block_size, block_size * bits / 8)`` uint8; the zero point is ``2 ** (bits - 1)``.
        scales: ``(N, K / block_size)`` float32.
        bits: 8 or 4; two 4-bit values share a byte, the even one in its low half.
        block_size: weights that share a scale.
    """

    blocks: NDArray[np.uint8]
    scales: Float32Array
    bits: int
    block_size: int


def fitting_block_size(length: int, preferred: int) -> int:
    """The largest block size up to ``preferred`` that divides ``length``. Raises ``ExportError`` if none does."""
    for block_size in BLOCK_SIZES:
        if block_size <= preferred and length % block_size == 0:
            return block_size
    raise ExportError(
        f"a weight with {length} inputs cannot be split into blocks of 16 or more: use --target cpu-fp32 for this model"
    )


def quantize(weight: Float32Array, bits: int, block_size: int) -> QuantizedWeight:
    """Quantise a matrix row by row.

    Args:
        weight: ``(N, K)`` float32, one row per output.
        bits: 8 or 4.
        block_size: divides K.
    """
    rows, length = weight.shape
    blocks = np.empty((rows, length // block_size, block_size * bits // 8), np.uint8)
    scales = np.empty((rows, length // block_size), np.float32)
    # In slices of rows: the temporaries of a whole vocabulary would be several times the matrix itself.
    for start in range(0, rows, _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        blocks[part], scales[part] = _quantize_rows(np.asarray(weight[part]), bits, block_size)
    return QuantizedWeight(blocks, scales, bits, block_size)


def pad_rows(weight: QuantizedWeight, rows: int) -> QuantizedWeight:
    """The matrix with rows of zeros behind its own, ``rows`` in all."""
    missing = rows - len(weight.blocks)
    if not missing:
        return weight
    zero = 0x80 if weight.bits == 8 else 0x88
    return weight._replace(
        blocks=np.pad(weight.blocks, ((0, missing), (0, 0), (0, 0)), constant_values=zero),
        scales=np.pad(weight.scales, ((0, missing), (0, 0)), constant_values=1.0),
    )


def dequantize(weight: QuantizedWeight) -> Float32Array:
    """The ``(N, K)`` float32 matrix that the kernels compute with."""
    values = weight.blocks
    if weight.bits == 4:
        values = np.stack([values & 15, values >> 4], axis=-1).reshape(*values.shape[:2], weight.block_size)
    zero_point = 1 << (weight.bits - 1)
    dense = (values.astype(np.float32) - zero_point) * weight.scales[..., None]
    return dense.reshape(values.shape[0], -1)


def _quantize_rows(weight: Float32Array, bits: int, block_size: int) -> tuple[NDArray[np.uint8], Float32Array]:
    blocks = weight.reshape(weight.shape[0], -1, block_size)
    largest = (1 << (bits - 1)) - 1
    scales = np.abs(blocks).max(axis=-1) / np.float32(largest)
    scales[scales == 0] = 1.0
    values = np.clip(np.rint(blocks / scales[..., None]), -largest, largest) + (largest + 1)
    quantized = values.astype(np.uint8)
    if bits == 4:
        quantized = quantized[..., 0::2] | (quantized[..., 1::2] << 4)
    return quantized, scales.astype(np.float32)
