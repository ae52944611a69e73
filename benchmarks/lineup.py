"""Who is measured on which model, and where each gets its files from."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks.files import bundles, gpt2
from benchmarks.files.cache import built, remove_others, run_module
from benchmarks.machine import version_of

OWN: Final = "edge_llm"
CONTEXT: Final = 1024
MODELS: Final = ("gpt2-124m", "smollm2-135m")
# Random tokens after which the first few choices are clear too, so that rounding does not decide them.
_GPT2_SEED: Final = 44
# "The car had been charging since the early morning, and the display in the kitchen showed that it would be ready
# before noon. She poured a second cup of coffee, opened the window, and asked how far it was to the coast. The answer
# came at once: two hundred and forty kilometres, with one short stop on"
# fmt: off
_SMOLLM2_TEXT_IDS: Final = (
    504, 1076, 761, 719, 15478, 1675, 260, 1584, 5738, 28, 284, 260, 3833, 281, 260, 9902, 4342, 338, 357, 736, 325,
    4421, 1092, 27616, 30, 2306, 21620, 253, 1796, 7118, 282, 6728, 28, 6572, 260, 5700, 28, 284, 3413, 638, 1869, 357,
    436, 288, 260, 4051, 30, 378, 2988, 2422, 418, 2268, 42, 827, 3822, 284, 14510, 18541, 28, 351, 582, 1890, 2853,
    335,
)
# fmt: on


@dataclass(frozen=True)
class Entrant:
    """An engine on a model.

    Attributes:
        engine: its name in the rows; a setting of a peer comes behind a blank, as in "llama.cpp flash-attention".
        load: ``module:function`` of its ``load``.
        needs: importable module → requirement for pip.
        prepare: makes its files in the cache folder, and returns what to load.
    """

    engine: str
    load: str
    needs: dict[str, str]
    prepare: Callable[[Path], Path]

    @property
    def missing(self) -> str | None:
        """Status of the row when a package is not installed."""
        absent = [pip for module, pip in self.needs.items() if importlib.util.find_spec(module) is None]
        return f"missing: pip install {' '.join(absent)}" if absent else None


def lineup(model: str) -> list[Entrant]:
    """The engines of a model, this runtime first."""
    return _GPT2 if model == "gpt2-124m" else _SMOLLM2


def prompt_ids(model: str, count: int) -> list[int]:
    """The same for every engine: English for SmolLM2, whose choices are then clear; random ones for GPT-2's shape.

    Raises:
        ValueError: the English text is not as long.
    """
    if model == "smollm2-135m":
        if count > len(_SMOLLM2_TEXT_IDS):
            raise ValueError(f"the text has {len(_SMOLLM2_TEXT_IDS)} tokens, not {count}")
        return list(_SMOLLM2_TEXT_IDS[:count])
    return [int(token_id) for token_id in np.random.default_rng(_GPT2_SEED).integers(0, gpt2.END_OF_TEXT_ID, count)]


def _converted(package: str, cache_dir: Path, suffix: str, convert: Callable[[Path, Path], None]) -> Path:
    """The GPT-2-shaped checkpoint in a peer's format, keyed by the checkpoint and the peer's version."""
    checkpoint = bundles.gpt2_checkpoint(cache_dir)
    key = checkpoint.name.removeprefix("checkpoint-")
    path = checkpoint.parent / f"{package}-{version_of(package)}-{key}{suffix}"
    built(path, functools.partial(convert, checkpoint))
    remove_others(path, f"{package}-")
    return path


def _by_own_converter(package: str, cache_dir: Path) -> Path:
    return _converted(
        package,
        cache_dir,
        "",
        lambda checkpoint, out: run_module("benchmarks.files.peers", package, checkpoint, out),
    )


def _gpt2_gguf(cache_dir: Path) -> Path:
    from benchmarks.files.gguf_q8 import write_gpt2

    return _converted("gguf", cache_dir, ".Q8_0.gguf", write_gpt2)


def _smollm2_gguf(cache_dir: Path) -> Path:
    from benchmarks.files.gguf_q8 import requantise
    from export.alias import fetch_alias

    source = fetch_alias(bundles.SMOLLM2_ALIAS)
    path = cache_dir / "smollm2-135m" / f"gguf-{version_of('gguf')}.Q8_0.gguf"
    return built(path, functools.partial(requantise, source))


def _llama_cpp(prepare: Callable[[Path], Path]) -> list[Entrant]:
    needs = {"llama_cpp": "llama-cpp-python", "gguf": "gguf"}
    return [
        Entrant("llama.cpp", "benchmarks.engines.llama:load", needs, prepare),
        Entrant("llama.cpp flash-attention", "benchmarks.engines.llama:load_flash", needs, prepare),
    ]


_TORCH: Final = {"torch": "torch", "transformers": "transformers"}
_OWN_NEEDS: Final = {"onnxruntime": "onnxruntime", "onnx": "onnx"}
_OPTIMUM_NEEDS: Final = {"optimum.onnxruntime": "optimum-onnx", **_TORCH}
_optimum = functools.partial(_by_own_converter, "optimum-onnx")
_GPT2: Final = [
    Entrant(OWN, "benchmarks.engines.edge:load", _OWN_NEEDS, bundles.gpt2_bundle),
    Entrant(
        "ctranslate2",
        "benchmarks.engines.ct2:load",
        {"ctranslate2": "ctranslate2", **_TORCH},
        functools.partial(_by_own_converter, "ctranslate2"),
    ),
    Entrant("optimum-onnx", "benchmarks.engines.optimum_ort:load", _OPTIMUM_NEEDS, _optimum),
    Entrant("optimum-onnx generate()", "benchmarks.engines.optimum_ort:load_generate", _OPTIMUM_NEEDS, _optimum),
    Entrant("transformers", "benchmarks.engines.hf:load", _TORCH, bundles.gpt2_checkpoint),
    *_llama_cpp(_gpt2_gguf),
]
_SMOLLM2: Final = [
    Entrant(
        OWN,
        "benchmarks.engines.edge:load",
        {**_OWN_NEEDS, "gguf": "gguf"},
        functools.partial(bundles.smollm2_bundle, context=CONTEXT),
    ),
    *_llama_cpp(_smollm2_gguf),
]
