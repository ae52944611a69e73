"""Whether the machine runs on a battery and how hot it is, as Linux tells under /sys/class."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_log = logging.getLogger(__name__)

SYS_CLASS: Final = Path("/sys/class")
# Once too hot, the machine has to cool down by this much; otherwise work would stop and start every few seconds.
HYSTERESIS_C: Final = 5.0
# What lies outside comes from a sensor that is not there: some drivers say -274 degrees, or 255.
_PLAUSIBLE_C: Final = (-100.0, 200.0)
_BATTERY_TYPES: Final = frozenset({"Battery", "UPS"})


@dataclass(frozen=True)
class Power:
    """The state of the machine.

    Attributes:
        on_battery: whether it runs on a battery; None where the system does not say.
        temperature_c: of its hottest thermal zone, in degrees Celsius; None where there is no sensor.
    """

    on_battery: bool | None
    temperature_c: float | None


def read_power(root: Path = SYS_CLASS) -> Power:
    """Read the state. Never raises: what cannot be read is unknown.

    Files: Documentation/ABI/testing/sysfs-class-power and sysfs-class-thermal of the Linux sources.

    Args:
        root: the folder that holds ``power_supply`` and ``thermal``.
    """
    return Power(_on_battery(root / "power_supply"), _temperature_c(root / "thermal"))


class PowerGate:
    """Whether work that nobody waits for may run now. Not thread-safe: one thread owns it.

    What is unknown forbids nothing; while it is too hot, a sensor that falls silent does not end that.

    Args:
        on_battery_allowed: whether it may run on a battery.
        max_temperature_c: above it, it may not; None is no limit.
        root: as for ``read_power``.
        interval_s: seconds for which an answer holds; reading takes some milliseconds on some machines.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        on_battery_allowed: bool,
        max_temperature_c: float | None,
        root: Path = SYS_CLASS,
        interval_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on_battery_allowed = on_battery_allowed
        self._max_temperature_c = max_temperature_c
        self._root = root
        self._interval_s = interval_s
        self._clock = clock
        self._valid_until: float | None = None
        self._too_hot = False
        self._allowed = True

    def allows(self) -> bool:
        """Whether it may run. Never raises; logs one line whenever the answer changes."""
        now = self._clock()
        if self._valid_until is None or now >= self._valid_until:
            self._valid_until = now + self._interval_s
            self._update()
        return self._allowed

    def _update(self) -> None:
        if self._on_battery_allowed and self._max_temperature_c is None:
            return
        power = read_power(self._root)
        if self._max_temperature_c is not None and power.temperature_c is not None:
            margin_c = HYSTERESIS_C if self._too_hot else 0.0
            self._too_hot = power.temperature_c > self._max_temperature_c - margin_c
        forbidden_by_battery = power.on_battery is True and not self._on_battery_allowed
        allowed = not (self._too_hot or forbidden_by_battery)
        if allowed != self._allowed:
            extra = {"on_battery": power.on_battery, "temperature_c": power.temperature_c}
            if allowed:
                _log.info("prefetch goes on", extra=extra)
            else:
                _log.info("prefetch pauses: %s", "on battery" if forbidden_by_battery else "too hot", extra=extra)
        self._allowed = allowed


def _on_battery(folder: Path) -> bool | None:
    external, statuses = [], []
    for supply in _folders(folder, "*"):
        kind = _read(supply / "type")
        # The battery of a mouse or a headset.
        if kind is None or _read(supply / "scope") == "Device":
            continue
        if kind in _BATTERY_TYPES:
            statuses.append(_read(supply / "status"))
        else:
            online = _read(supply / "online")
            # 1 is a fixed supply, 2 a programmable one (USB Power Delivery).
            external.append(None if online is None else online != "0")
    if True in external:
        return False
    if "Discharging" in statuses:
        return True
    if any(status in ("Charging", "Full", "Not charging") for status in statuses):
        return False
    # A battery that says nothing, and every other supply is unplugged.
    return True if statuses and external and None not in external else None


def _temperature_c(folder: Path) -> float | None:
    lowest, highest = _PLAUSIBLE_C
    values = []
    for zone in _folders(folder, "thermal_zone*"):
        text = _read(zone / "temp")
        try:
            temperature_c = int(text or "") / 1000  # the kernel counts in thousandths
        except (ValueError, OverflowError):
            continue
        if lowest <= temperature_c <= highest:
            values.append(temperature_c)
    return max(values, default=None)


def _folders(folder: Path, pattern: str) -> list[Path]:
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []


def _read(path: Path) -> str | None:
    """The first line of a file, or None: drivers refuse a read with many an error, and devices vanish."""
    try:
        with path.open("rb") as stream:
            return stream.read(256).decode("ascii").strip()
    except (OSError, ValueError):
        return None
