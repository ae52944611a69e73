"""Which ONNX Runtime execution provider serves, and why the ones before it do not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnxruntime as ort

from edge_llm.errors import UnsupportedBundleError

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class ProviderChoice:
    """The provider in use, and a reason for each one refused before it."""

    name: str
    refused: dict[str, str]


def choose_provider(wanted: Sequence[str]) -> ProviderChoice:
    """The first of ``wanted`` that this onnxruntime has.

    Raises:
        UnsupportedBundleError: none of them.
    """
    available = ort.get_available_providers()
    refused: dict[str, str] = {}
    for name in wanted:
        if name in available:
            return ProviderChoice(name, refused)
        refused[name] = f"onnxruntime {ort.__version__} was built without it"
    raise UnsupportedBundleError(
        f"none of the providers {', '.join(wanted)} is in onnxruntime {ort.__version__}, "
        f"which has: {', '.join(available)}. Set engine.providers or install another onnxruntime"
    )
