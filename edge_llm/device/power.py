"""How hot the machine is and what feeds it, as Linux tells, and what gives way in heat.

Files: Documentation/ABI/testing/sysfs-class-power and sysfs-class-thermal of the Linux sources; ``thermal_throttle`` of
x86 processors; ``get_throttled`` of the Raspberry Pi's firmware driver; nvpmodel's files of NVIDIA's JetPack.
"""

from __future__ import annotations

import logging
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from edge_llm.device.sensors import run_now
from edge_llm.device.sysfs import folders, read_int, read_line, read_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge_llm.config import PowerConfig
    from edge_llm.device.sensors import Post

_log = logging.getLogger(__name__)

PowerLevel: TypeAlias = Literal["normal", "warm", "hot"]
_LEVELS: Final[tuple[PowerLevel, ...]] = ("normal", "warm", "hot")
ROOT: Final = Path("/")
# What lies outside comes from a sensor that is not there: some drivers say -274 degrees, or 255.
_PLAUSIBLE_C: Final = (-100.0, 200.0)
_BATTERY_TYPES: Final = frozenset({"Battery", "UPS"})
# A cooling device of these types slows a processor down; others are fans.
_SLOWING: Final = re.compile(r"processor|cpufreq|devfreq|cpu|gpu", re.IGNORECASE)
_PI_THROTTLED: Final = "devices/platform/soc/soc:firmware/get_throttled"
# Frequency capped, throttled, soft temperature limit; bit 0 is the supply's voltage, and the upper ones the past.
_PI_SLOWED_BITS: Final = 0b1110
_NVPMODEL_NAME: Final = re.compile(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>")


@dataclass(frozen=True)
class Power:
    """The state of the machine.

    Attributes:
        on_battery: whether it runs on a battery; None where the system does not say.
        temperature_c: of its hottest thermal zone, in degrees Celsius; None where there is no sensor.
        throttled: whether the system slows a processor down now; None where it does not say.
        throttle_count: how often it has done so since the start; None where it does not count.
    """

    on_battery: bool | None
    temperature_c: float | None
    throttled: bool | None = None
    throttle_count: int | None = None


def read_power(root: Path = ROOT) -> Power:
    """Read the state. Never raises: what cannot be read is unknown.

    Args:
        root: the folder that holds ``sys``.
    """
    sys = root / "sys"
    return Power(
        _on_battery(sys / "class/power_supply"),
        _temperature_c(sys / "class/thermal"),
        _throttled(sys),
        _throttle_count(sys / "devices/system/cpu"),
    )


def nvpmodel_mode(root: Path = ROOT) -> str | None:
    """The name of the power mode that a Jetson is in; None on other boards."""
    status = re.search(r"pmode:(\d+)", read_text(root / "var/lib/nvpmodel/status") or "")
    if status is None:
        return None
    number = int(status[1])
    return nvpmodel_modes(root).get(number, f"mode {number}")


def nvpmodel_modes(root: Path = ROOT) -> dict[int, str]:
    """The names of a Jetson's power modes by their numbers: modules of one family differ. Empty on other boards."""
    try:
        text = (root / "etc/nvpmodel.conf").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    return {int(number): name for number, name in _NVPMODEL_NAME.findall(text)}


class PowerMonitor:
    """The level of heat, and whether work that nobody waits for may run. Not thread-safe: one thread owns it.

    What is unknown forbids nothing; a sensor that falls silent in the heat does not end a level.

    Args:
        config: where the levels begin and end.
        on_battery_allowed: whether prefetch may run on a battery.
        root: as for ``read_power``.
        clock: seconds, monotonic.
        post: has the sensors read, on a thread of their own if they may hang; until a reading comes the last one holds.

    Attributes:
        on_change: told every new level.
        temperature_c: at the last reading; None if it is unknown.
    """

    def __init__(
        self,
        config: PowerConfig,
        on_battery_allowed: bool = True,
        root: Path = ROOT,
        clock: Callable[[], float] = time.monotonic,
        post: Post = run_now,
    ) -> None:
        self.on_change: Callable[[PowerLevel], None] = lambda _level: None
        self._config = config
        self._on_battery_allowed = on_battery_allowed
        self._root = root
        self._clock = clock
        self._post = post
        self._reading: Power | None = None  # that has come and has not been looked at
        self._valid_until: float | None = None
        self._heat = 0  # of the sensors
        self._level = 0  # of the sensors or of throttling
        self.temperature_c: float | None = None
        self._throttle_count: int | None = None
        self._throttled_at: float | None = None
        self._forbidden = False

    @property
    def level(self) -> PowerLevel:
        """The level at the last reading."""
        return _LEVELS[self._level]

    def allows_prefetch(self) -> bool:
        """Whether work that nobody waits for may run now."""
        self.refresh()
        return self._level == 0 and not self._forbidden

    def max_active(self, slots: int) -> int:
        """How many queries may be answered at once."""
        return 1 if self.level == "hot" else slots

    def max_tokens(self, default: int) -> int:
        """The longest answer to a query that sets no length."""
        return min(default, self._config.hot_max_tokens) if self.level == "hot" else default

    def refresh(self) -> None:
        """Have the sensors read if it is time, and go by what has come. Never raises; a new level is logged."""
        now = self._clock()
        config = self._config
        if self._on_battery_allowed and config.warm_c is None and config.hot_c is None:
            return
        if self._valid_until is None or now >= self._valid_until:
            self._valid_until = now + config.interval_s
            self._post(self._read)
        power = self._reading
        if power is not None:
            self._reading = None
            self._set_forbidden(power)
            self._set_level(power, now)

    def _read(self) -> None:
        self._reading = read_power(self._root)

    def _set_forbidden(self, power: Power) -> None:
        forbidden = power.on_battery is True and not self._on_battery_allowed
        if forbidden != self._forbidden:
            _log.info("on battery: nothing is prefetched" if forbidden else "off battery: prefetch goes on")
        self._forbidden = forbidden

    def _set_level(self, power: Power, now: float) -> None:
        self.temperature_c = power.temperature_c
        if power.temperature_c is not None:
            self._heat = self._heat_of(power.temperature_c)
        level = max(self._heat, int(self._is_throttled(power, now)))
        if level == self._level:
            return
        self._level = level
        name = _LEVELS[level]
        extra = {"level": name, "temperature_c": power.temperature_c, "throttled": power.throttled}
        _log.log(logging.INFO if level == 0 else logging.WARNING, "the machine is %s", name, extra=extra)
        self.on_change(name)

    def _heat_of(self, temperature_c: float) -> int:
        """The highest level whose threshold is reached; one that has been reached ends some degrees below it."""
        level = 0
        for candidate, threshold in ((1, self._config.warm_c), (2, self._config.hot_c)):
            if threshold is None:
                continue
            margin = self._config.hysteresis_c if self._heat >= candidate else 0.0
            if temperature_c >= threshold - margin:
                level = candidate
        return level

    def _is_throttled(self, power: Power, now: float) -> bool:
        """Whether a processor is slowed down, or was within the last few readings."""
        if self._config.warm_c is None:
            return False
        before, self._throttle_count = self._throttle_count, power.throttle_count
        counted = before is not None and power.throttle_count is not None and power.throttle_count > before
        if power.throttled or counted:
            self._throttled_at = now
        # Throttling comes and goes by the second; a level that follows it would flap.
        return self._throttled_at is not None and now - self._throttled_at < 6 * self._config.interval_s


def _on_battery(folder: Path) -> bool | None:
    external, statuses = [], []
    for supply in folders(folder, "*"):
        kind = read_line(supply / "type")
        # The battery of a mouse or a headset.
        if kind is None or read_line(supply / "scope") == "Device":
            continue
        if kind in _BATTERY_TYPES:
            statuses.append(read_line(supply / "status"))
        else:
            online = read_line(supply / "online")
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
    for zone in folders(folder, "thermal_zone*"):
        thousandths = read_int(zone / "temp")
        if thousandths is not None and lowest * 1000 <= thousandths <= highest * 1000:
            values.append(thousandths / 1000)
    return max(values, default=None)


def _throttled(sys: Path) -> bool | None:
    firmware = read_line(sys / _PI_THROTTLED)
    if firmware is not None:
        try:
            return bool(int(firmware, 16) & _PI_SLOWED_BITS)
        except ValueError:
            return None
    states = [
        read_int(device / "cur_state")
        for device in folders(sys / "class/thermal", "cooling_device*")
        if _SLOWING.search(read_line(device / "type") or "")
    ]
    known = [state for state in states if state is not None]
    return any(state > 0 for state in known) if known else None


def _throttle_count(folder: Path) -> int | None:
    counts = [read_int(cpu / "thermal_throttle/core_throttle_count") for cpu in folders(folder, "cpu[0-9]*")]
    known = [count for count in counts if count is not None]
    return sum(known) if known else None
