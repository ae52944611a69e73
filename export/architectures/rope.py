"""Rotary position frequencies, with the scalings that are a fixed table.

Source of the formulas: transformers ``modeling_rope_utils.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from export.architectures.settings import Settings
from export.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from export.tensors import Float32Array


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's scaling: long wavelengths are stretched by ``factor``, short ones kept, those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context_length: int


@dataclass(frozen=True)
class Rope:
    """Rotary positions of a model.

    Attributes:
        theta: base of the frequencies.
        linear_factor: positions are divided by this.
        llama3: Llama 3.1's scaling, or None.
    """

    theta: float
    linear_factor: float = 1.0
    llama3: Llama3Scaling | None = None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Rope:
        """Read ``rope_theta`` and ``rope_scaling`` (or transformers 5's ``rope_parameters``) from config.json.

        Raises:
            ExportError: the scaling is not one of default, linear and llama3; the message names it.
        """
        scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(scaling, dict):
            raise ExportError(f"config.json: rope_scaling is {scaling!r}, not a table")
        base = scaling if "rope_theta" in scaling else config
        theta = Settings(base, "config.json").number("rope_theta", 10000.0)
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        read = Settings(scaling, "config.json: rope_scaling")
        if kind == "default":
            return cls(theta)
        if kind == "linear":
            return cls(theta, linear_factor=read.number("factor"))
        if kind == "llama3":
            scaled = Llama3Scaling(
                factor=read.number("factor"),
                low_freq_factor=read.number("low_freq_factor"),
                high_freq_factor=read.number("high_freq_factor"),
                original_context_length=read.integer("original_max_position_embeddings"),
            )
            return cls(theta, llama3=scaled)
        raise ExportError(f"config.json: rope_scaling of type {kind!r} is not supported, only linear and llama3")

    def inverse_frequencies(self, head_dim: int) -> Float32Array:
        """Angle per position of each pair, ``(head_dim / 2,)`` float32."""
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        frequencies: Float32Array = (1.0 / np.float32(self.theta) ** exponents) / np.float32(self.linear_factor)
        frequencies = frequencies.astype(np.float32)
        if self.llama3 is not None:
            frequencies = _scale_llama3(frequencies, self.llama3)
        return frequencies


def _scale_llama3(frequencies: Float32Array, scaling: Llama3Scaling) -> Float32Array:
    wavelengths = 2 * math.pi / frequencies
    longest = scaling.original_context_length / scaling.low_freq_factor
    shortest = scaling.original_context_length / scaling.high_freq_factor
    smooth = (scaling.original_context_length / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    scaled = np.where(wavelengths > longest, frequencies / scaling.factor, frequencies)
    between = (wavelengths <= longest) & (wavelengths >= shortest)
    return np.where(between, blended, scaled).astype(np.float32)
