"""Device files: one TOML per board under device_configs/, each only the differences from default.toml.

What ``edge-llm tune`` has measured on this very machine lies in the cache folder and is laid over the board's file.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from edge_llm.bundle.files import replace_file
from edge_llm.config import merge, read_toml
from edge_llm.device.board import DEFAULT_DEVICE
from edge_llm.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

TUNED_FILE: Final = "tuned.toml"
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


def tuned_layer(cache_dir: Path, device: str) -> dict[str, Any]:
    """What was measured on this machine, if it was measured as this board.

    Raises:
        ConfigError: the file is malformed.
    """
    path = cache_dir / TUNED_FILE
    if not path.is_file():
        return {}
    layer = read_toml(path)
    return {} if layer.pop("device", None) != device else layer


def write_tuned(cache_dir: Path, device: str, engine: Mapping[str, int], remark: str) -> Path:
    """Keep what was measured; returns the file. Raises ``ConfigError`` if it cannot be written."""
    path = cache_dir / TUNED_FILE
    lines = [
        f"# {remark}",
        f'device = "{device}"',
        "",
        "[engine]",
        *(f"{key} = {value}" for key, value in engine.items()),
    ]
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        replace_file(path, ("\n".join(lines) + "\n").encode())
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None
    return path


def _folder() -> Path:
    for folder in _FOLDERS:
        if (folder / f"{DEFAULT_DEVICE}.toml").is_file():
            return folder
    raise ConfigError(f"the device files are missing from {_FOLDERS[0]}: install edge-llm again")
