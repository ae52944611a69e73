"""What the machine draws, where it measures that: a power rail of the board, or the processor's energy counter.

Sources: the INA3221 monitor of Jetson boards under ``/sys/class/hwmon`` (Documentation/hwmon/ina3221.rst), hwmon's
``power*_input`` of other boards, and Intel's and AMD's RAPL counter under ``/sys/class/powercap`` (readable by root).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from edge_llm.device.sensors import run_now
from edge_llm.device.sysfs import folders, read_int, read_line

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge_llm.device.sensors import Post
    from edge_llm.metrics import Metrics

# The rail that feeds the whole module, by the names that carriers give it.
_WHOLE_BOARD: Final = ("VDD_IN", "VDD_GPU_SOC", "VIN_SYS_5V0", "POM_5V_IN", "VIN")


class Meter(Protocol):
    """Something that tells how much energy has been drawn."""

    name: str

    def begin(self) -> None:
        """What is measured begins now."""
        ...

    def power_w(self) -> float | None:
        """Watts now, or on average since ``begin``; None if it cannot be read any more."""
        ...


class RailMeter:
    """A monitored rail: millivolts and milliamperes, or microwatts."""

    def __init__(self, name: str, microwatts: Path | None, millivolts: Path | None, milliamperes: Path | None) -> None:
        self.name = name
        self._microwatts, self._millivolts, self._milliamperes = microwatts, millivolts, milliamperes

    def begin(self) -> None:
        """Nothing: a rail tells the moment, and reading it takes a while."""

    def power_w(self) -> float | None:
        """Watts now."""
        if self._microwatts is not None:
            value = read_int(self._microwatts)
            return None if value is None else value / 1e6
        assert self._millivolts is not None
        assert self._milliamperes is not None
        millivolts, milliamperes = read_int(self._millivolts), read_int(self._milliamperes)
        return None if millivolts is None or milliamperes is None else millivolts * milliamperes / 1e6


class CounterMeter:
    """The processor package's energy counter, in microjoules; it wraps around at ``max_energy_range_uj``."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = read_line(folder / "name") or folder.name
        self._file = folder / "energy_uj"
        self._range = read_int(folder / "max_energy_range_uj") or 0
        self._clock = clock
        self._begun: tuple[float, int] | None = None

    def begin(self) -> None:
        """Start counting."""
        energy = read_int(self._file)
        self._begun = None if energy is None else (self._clock(), energy)

    def power_w(self) -> float | None:
        """Watts since ``begin``."""
        energy, now = read_int(self._file), self._clock()
        if energy is None or self._begun is None or now <= self._begun[0]:
            return None
        drawn = energy - self._begun[1]
        if drawn < 0:
            drawn += self._range
        return drawn / 1e6 / (now - self._begun[0])


class AnswerEnergy:
    """Counts what answers draw: the counters ``energy_mj`` and ``energy_answers``, and their quotient as a gauge.

    It is the draw of the whole rail while an answer was worked on, shared among those that ran beside it.

    Args:
        meter: what measures.
        metrics: gets the counters.
        post: has the meter read, on a thread of its own if it may hang.
    """

    def __init__(self, meter: Meter, metrics: Metrics, post: Post = run_now) -> None:
        self._meter = meter
        self._metrics = metrics
        self._post = post
        metrics.gauge("energy_per_answer_mj", self._mean_mj)

    def begin(self) -> None:
        """The first of the answers that run now has begun."""
        self._post(self._meter.begin)

    def end(self, elapsed_s: float, beside: int) -> None:
        """An answer has ended that took ``elapsed_s``, with ``beside`` others."""
        self._post(lambda: self._count(elapsed_s, beside))

    def _count(self, elapsed_s: float, beside: int) -> None:
        power_w = self._meter.power_w()
        if power_w is not None:
            self._metrics.count("energy_mj", round(power_w * elapsed_s * 1e3 / (beside + 1)))
            self._metrics.count("energy_answers")

    def _mean_mj(self) -> float:
        answers = self._metrics.counter("energy_answers")
        return round(self._metrics.counter("energy_mj") / answers, 1) if answers else 0.0


def find_meter(root: Path = Path("/")) -> Meter | None:
    """The meter that covers the most of the machine, or None. Never raises."""
    rails = _rails(root / "sys/class/hwmon")
    for wanted in _WHOLE_BOARD:
        for rail in rails:
            if rail.name.upper() == wanted and rail.power_w() is not None:
                return rail
    for folder in folders(root / "sys/class/powercap", "*-rapl:[0-9]*"):
        if folder.name.count(":") == 1 and read_int(folder / "energy_uj") is not None:
            return CounterMeter(folder)
    return None


def _rails(hwmon: Path) -> list[RailMeter]:
    rails = []
    for device in folders(hwmon, "hwmon*"):
        for label in folders(device, "in*_label"):
            number = label.name[len("in") : -len("_label")]
            name = read_line(label)
            if name:
                volts, amperes = device / f"in{number}_input", device / f"curr{number}_input"
                rails.append(RailMeter(name, None, volts, amperes))
        for label in folders(device, "power*_label"):
            number = label.name[len("power") : -len("_label")]
            name = read_line(label)
            if name:
                rails.append(RailMeter(name, device / f"power{number}_input", None, None))
    return rails
