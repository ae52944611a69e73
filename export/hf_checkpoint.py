"""A Hugging Face folder: config.json, weights, tokenizer, chat template, generation defaults."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final

import msgspec

from edge_llm.bundle.manifest import GenerationDefaults
from export.architectures.gpt2 import Gpt2Config
from export.architectures.llama import LlamaConfig
from export.checkpoint import ChatSettings, Checkpoint
from export.errors import ExportError
from export.tokenizer_files import load_tokenizer_json, prepends_token, token_ids
from export.weight_files import open_weights

if TYPE_CHECKING:
    from pathlib import Path

    from export.checkpoint import Architecture

# Prefix of the decoder's weights in a checkpoint with a head, which one without a head lacks.
_WEIGHT_PREFIXES: Final = {"gpt2": "transformer.", "llama": "model.", "mistral": "model.", "qwen2": "model."}


def load_folder(folder: Path, *, name: str, source: str) -> Checkpoint:
    """Load a folder as ``save_pretrained`` writes it, short of reading the weights.

    Raises:
        ExportError: a file is missing, malformed, or describes something that is not supported.
    """
    config = read_json(folder / "config.json")
    if config is None:
        raise ExportError(f"{folder} has no config.json: give a Hugging Face model folder")
    kind = str(config.get("model_type", ""))
    architecture = _read_architecture(config, kind)
    tensors = open_weights(folder, _WEIGHT_PREFIXES[kind])
    tokenizer_json = load_tokenizer_json(folder)
    chat = _read_chat(folder, tokenizer_json)
    generation = read_json(folder / "generation_config.json") or {}
    eos_ids = [*_ids(generation.get("eos_token_id")), *_ids(config.get("eos_token_id"))]
    if chat.eos_token:
        eos_ids += token_ids(tokenizer_json, [chat.eos_token])
    return Checkpoint(
        name=name,
        source=source,
        reference=f"{tensors.stored_dtype} weights",
        license=_read_license(folder),
        architecture=architecture,
        tensors=tensors,
        tokenizer_json=tokenizer_json,
        chat=chat,
        eos_token_ids=tuple(dict.fromkeys(eos_ids)),
        generation=_read_generation(generation),
        path=folder,
    )


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file, or None if there is no such file. Raises ``ExportError`` if it is malformed."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise ExportError(f"{path} does not hold a JSON object")
    return value


def _read_architecture(config: dict[str, Any], kind: str) -> Architecture:
    if kind not in _WEIGHT_PREFIXES:
        known = ", ".join(_WEIGHT_PREFIXES)
        raise ExportError(f"architecture {kind or config.get('architectures')!r} is not supported, only: {known}")
    if "quantization_config" in config:
        raise ExportError("the checkpoint is already quantised (quantization_config): give the original weights")
    return Gpt2Config.from_hf(config) if kind == "gpt2" else LlamaConfig.from_hf(config)


def _read_chat(folder: Path, tokenizer_json: str) -> ChatSettings:
    settings = read_json(folder / "tokenizer_config.json") or {}
    fallback = read_json(folder / "special_tokens_map.json") or {}
    bos_token = _token_text(settings.get("bos_token", fallback.get("bos_token")))
    eos_token = _token_text(settings.get("eos_token", fallback.get("eos_token")))
    try:
        template: str | None = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except FileNotFoundError:
        template = _named_template(settings.get("chat_template"))
    except (OSError, ValueError) as error:
        raise ExportError(f"cannot read {folder / 'chat_template.jinja'}: {error}") from None
    adds_bos = settings.get("add_bos_token")
    if adds_bos is None:
        adds_bos = bool(bos_token) and prepends_token(tokenizer_json, bos_token)
    return ChatSettings(template, bos_token, eos_token, bool(adds_bos))


def _named_template(value: object) -> str | None:
    """``chat_template`` of tokenizer_config.json: a string, or a list of named ones."""
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _token_text(value: object) -> str:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _ids(value: object) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, int) and item >= 0]


def _read_generation(settings: dict[str, Any]) -> GenerationDefaults:
    """Sampling settings of generation_config.json; a checkpoint that does not ask for sampling is answered greedily."""
    names = ["repetition_penalty"]
    if settings.get("do_sample"):
        names += ["temperature", "top_k", "top_p", "min_p"]
    given = {name: settings[name] for name in names if settings.get(name) is not None}
    if settings.get("do_sample"):
        given.setdefault("temperature", 1.0)
    try:
        return msgspec.convert(given, GenerationDefaults)
    except msgspec.ValidationError as error:
        raise ExportError(f"generation_config.json: {error}") from None


def _read_license(folder: Path) -> str:
    """``license:`` of the model card's front matter, or "unknown"."""
    try:
        card = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "unknown"
    front = re.match(r"---\s*\n(.*?)\n---", card, re.DOTALL)
    found = re.search(r"^license:\s*['\"]?([^'\"\n]+)", front.group(1), re.MULTILINE) if front else None
    return found.group(1).strip() if found else "unknown"
