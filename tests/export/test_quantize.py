"""Blocks of integers: layout, bounds and the kernels' reading of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.errors import ExportError
from export.quantize import dequantize, fitting_block_size, quantize


@given(st.integers(1, 5), st.integers(1, 6), st.sampled_from([4, 8]), st.sampled_from([16, 32, 64]), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_error_is_at_most_half_a_step(rows: int, blocks: int, bits: int, block_size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((rows, blocks * block_size)) * 10.0 ** rng.integers(-6, 4)).astype(np.float32)
    quantized = quantize(weight, bits, block_size)
    assert quantized.blocks.shape == (rows, blocks, block_size * bits // 8)
    assert quantized.scales.shape == (rows, blocks)
    steps = np.repeat(quantized.scales, block_size, axis=1)
    assert (np.abs(dequantize(quantized) - weight) <= steps * 0.5001).all()


def test_zeros_stay_zeros() -> None:
    quantized = quantize(np.zeros((3, 32), np.float32), 8, 16)
    assert (quantized.blocks == 128).all()
    assert (dequantize(quantized) == 0).all()


def test_many_rows_are_quantised_as_few() -> None:
    weight = np.random.default_rng(0).standard_normal((5000, 16)).astype(np.float32)
    whole, tail = quantize(weight, 8, 16), quantize(weight[4990:], 8, 16)
    np.testing.assert_array_equal(whole.blocks[4990:], tail.blocks)


def test_block_size_follows_the_matrix() -> None:
    assert [fitting_block_size(length, 128) for length in (768, 576, 96, 48)] == [128, 64, 32, 16]
    assert fitting_block_size(768, 32) == 32
    with pytest.raises(ExportError, match="cpu-fp32"):
        fitting_block_size(40, 128)
