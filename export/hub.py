"""Fetching a checkpoint from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from export.console import say
from export.errors import ExportError

_NEEDED_FILES: Final = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "README.md",
]
_TORCH_FILES: Final = ["pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"]


def fetch_snapshot(model: str) -> tuple[Path, str]:
    """Download the files that an export needs, or find them in the hub's own cache.

    Args:
        model: a hub id, ``name`` or ``owner/name``.

    Returns:
        The folder and the commit that it holds.

    Raises:
        ExportError: the hub cannot be reached, or has no such model.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise ExportError(
            "a hub id needs huggingface-hub: pip install 'edge-llm[export-lite]', or give a local folder"
        ) from None
    say(f"fetching {model} from the Hugging Face hub")
    try:
        folder = Path(huggingface_hub.snapshot_download(model, allow_patterns=_NEEDED_FILES))
        if not list(folder.glob("*.safetensors")):
            folder = Path(huggingface_hub.snapshot_download(model, allow_patterns=_NEEDED_FILES + _TORCH_FILES))
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise ExportError(
            f"cannot fetch {model} from the Hugging Face hub ({type(error).__name__}: {lines[0] if lines else ''}): "
            f"check the name and the network, or give a local folder"
        ) from None
    return folder, folder.name
