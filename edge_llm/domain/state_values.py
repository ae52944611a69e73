"""Values that the host publishes for answers to use: ``state/{name}``, retained on the broker."""

from __future__ import annotations

import math
import re
import threading
from decimal import Decimal
from typing import Final

import msgspec

MAX_PAYLOAD_BYTES: Final = 256
# A host may publish more than a bundle uses, but not without end.
_MAX_NAMES: Final = 256


class StateValues:
    """The latest value of each name. Thread-safe: written by the network's thread, read by the engine's."""

    def __init__(self) -> None:
        self._values: dict[str, int | float | str] = {}
        self._lock = threading.Lock()

    def update(self, name: str, payload: bytes) -> bool:
        """Take a payload: a JSON number or string, or bare text; an empty one takes the value back.

        Returns:
            False if the payload is neither a number nor a short text, or there are too many names.
        """
        if len(payload) > MAX_PAYLOAD_BYTES:
            return False
        value = _decode(payload) if payload.strip() else ""
        if value is None:
            return False
        with self._lock:
            if value == "":
                self._values.pop(name, None)
            elif name in self._values or len(self._values) < _MAX_NAMES:
                self._values[name] = value
            else:
                return False
        return True

    def get(self, name: str, kind: str) -> str | None:
        """A value as it is said, or None if there is none of that kind (``integer``, ``number`` or ``text``)."""
        with self._lock:
            value = self._values.get(name)
        if value is None:
            return None
        if kind == "text":
            return value if isinstance(value, str) else _number(value)
        if isinstance(value, str):
            return None
        return str(round(value)) if kind == "integer" else _number(value)


def _number(value: float) -> str:
    """Six digits, or all before the point; never ``1e+06``."""
    if isinstance(value, int) or abs(value) >= 999_999:
        return str(round(value))
    return format(Decimal(f"{value + 0.0:g}"), "f")


def _decode(payload: bytes) -> int | float | str | None:
    try:
        text = payload.decode().strip()
    except UnicodeDecodeError:
        return None
    try:
        value = msgspec.json.decode(text.encode())
    except msgspec.DecodeError:
        value = text
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str):
        # It is spoken: one line, no control characters.
        return re.sub(r"\s+", " ", "".join(c for c in value if c.isprintable() or c.isspace())).strip()
    return value if math.isfinite(value) else None
