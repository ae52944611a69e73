"""Typed reading of a checkpoint's configuration, which comes from outside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from export.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Mapping


class Settings:
    """A configuration's values, each checked as it is read.

    Args:
        values: the parsed file.
        source: its name, for messages.
    """

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self._values = values
        self._source = source

    def integer(self, name: str, default: int | None = None) -> int:
        """A positive whole number; ``default`` stands in for a missing or null one. Raises ``ExportError``."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ExportError(f"{self._source}: {name} is {value!r}, not a positive whole number")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number; ``default`` stands in for a missing or null one. Raises ``ExportError``."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ExportError(f"{self._source}: {name} is {value!r}, not a positive number")
        return float(value)

    def _get(self, name: str, default: float | None) -> Any:
        value = self._values.get(name)
        if value is None:
            value = default
        if value is None:
            raise ExportError(f"{self._source} lacks {name}: the checkpoint is incomplete, download it again")
        return value
