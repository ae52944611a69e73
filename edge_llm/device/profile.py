"""Device files: one TOML per board under device_configs/, each only the differences from default.toml."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from edge_llm.config import merge, read_toml
from edge_llm.device.board import DEFAULT_DEVICE
from edge_llm.errors import ConfigError

# In the wheel the files lie inside the package; in a checkout, beside it.
_FOLDERS: Final = (
    Path(__file__).parent.parent / "device_configs",
    Path(__file__).parent.parent.parent / "device_configs",
)


def device_names() -> list[str]:
    """The boards that have a file."""
    return sorted(path.stem for path in _folder().glob("*.toml"))


def device_layer(name: str) -> dict[str, Any]:
    """Settings of a board, laid over the default's.

    Raises:
        ConfigError: there is no such board, or its file is malformed.
    """
    folder = _folder()
    layer = read_toml(folder / f"{DEFAULT_DEVICE}.toml")
    if name == DEFAULT_DEVICE:
        return layer
    if name not in device_names():
        raise ConfigError(f"no device file for {name!r}; there are: {', '.join(device_names())}")
    return merge(layer, read_toml(folder / f"{name}.toml"))


def _folder() -> Path:
    for folder in _FOLDERS:
        if (folder / f"{DEFAULT_DEVICE}.toml").is_file():
            return folder
    raise ConfigError(f"the device files are missing from {_FOLDERS[0]}: install edge-llm again")
