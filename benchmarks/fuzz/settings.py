"""Subjects: settings, as people and images write them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from benchmarks.fuzz.bundle_files import SMALL_BUNDLE, check_drop_in
from benchmarks.fuzz.mutation import restated_toml
from benchmarks.fuzz.subject import require
from edge_llm.bundle.manifest import Bundle
from edge_llm.config import Config, load_config, read_toml
from edge_llm.install_command import config_text
from edge_llm.mqtt.topics import Topics
from edge_llm.unit_files import Machine, drop_in_text

if TYPE_CHECKING:
    from random import Random

_DEVICES: Final = Path(__file__).parent.parent.parent / "device_configs"


class Configs:
    """``config.toml``, with every setting in it."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "config.toml"
        settings = msgspec.to_builtins(Config())
        settings |= {"bundle": "/opt/bundle", "bundle_keys": ["/etc/edge-llm/fleet.pub"], "state_dir": "/var/lib/x"}
        settings["mqtt"] |= {"pool": "garage", "username": "edge", "password_file": "/etc/x", "client_id": "car7"}
        self._raw = config_text(_set_only(settings)).encode()
        self._bundle = Bundle.open(SMALL_BUNDLE)

    def make(self, rng: Random) -> bytes:
        """A config file."""
        return restated_toml(self._raw, rng)

    def take(self, case: bytes) -> str:
        """Load it, write it again, and write the unit's drop-in for it."""
        self._path.write_bytes(case)
        config = load_config(config_file=self._path)
        Topics(config.mqtt.node, config.mqtt.pool)
        check_drop_in(drop_in_text(Machine(("/opt/x",), config, self._bundle)))
        self._path.write_text(config_text(_set_only(msgspec.to_builtins(config))), encoding="utf-8")
        require(
            repr(load_config(config_file=self._path)) == repr(config), "it reads otherwise when it is written again"
        )
        return "taken"


class Devices:
    """The device files."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "device.toml"
        self._files = [path.read_bytes() for path in sorted(_DEVICES.glob("*.toml"))]

    def make(self, rng: Random) -> bytes:
        """A device file."""
        return restated_toml(rng.choice(self._files), rng)

    def take(self, case: bytes) -> str:
        """Load it."""
        self._path.write_bytes(case)
        load_config(device_layer=read_toml(self._path))
        return "taken"


def _set_only(settings: dict[str, Any]) -> dict[str, Any]:
    """Without what is not set: TOML has no word for it."""
    return {
        key: _set_only(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if value is not None
    }
