"""A sensor that does not answer: a pipe that nobody writes to stands for it."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_llm.config import PowerConfig
from edge_llm.device.energy import AnswerEnergy, find_meter
from edge_llm.device.power import PowerMonitor
from edge_llm.device.sensors import SensorThread
from edge_llm.metrics import Metrics
from tests.brokers import wait_for

WAIT_S = 10.0


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class StalledFile:
    """A file whose reader hangs until ``answer``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(path)

    def answer(self, text: str) -> None:
        with self._path.open("w") as pipe:
            pipe.write(f"{text}\n")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def sensors(clock) -> Iterator[SensorThread]:
    sensors = SensorThread(clock)
    yield sensors
    sensors.close()


@pytest.fixture
def thermometer(tmp_path) -> StalledFile:
    return StalledFile(tmp_path / "sys/class/thermal/thermal_zone0/temp")


def hangs(sensors: SensorThread) -> bool:
    return sensors._busy_since is not None


def is_idle(sensors: SensorThread) -> bool:
    idle = threading.Event()
    sensors.post(idle.set)
    return idle.wait(WAIT_S)


def has_level(power: PowerMonitor, level: str) -> Callable[[], bool]:
    def check() -> bool:
        power.refresh()
        return power.level == level

    return check


def test_a_thermometer_that_hangs_changes_nothing_until_it_answers(tmp_path, clock, sensors, thermometer):
    power = PowerMonitor(PowerConfig(), root=tmp_path, clock=clock, post=sensors.post)
    assert power.allows_prefetch()
    wait_for(lambda: hangs(sensors), WAIT_S)
    for _ in range(5):
        clock.now_s += 10.0
        assert power.allows_prefetch()
    thermometer.answer("90000")
    wait_for(has_level(power, "hot"), WAIT_S)
    # It hangs again, in the heat: the last value holds.
    clock.now_s += 10.0
    power.refresh()
    wait_for(lambda: hangs(sensors), WAIT_S)
    for _ in range(5):
        clock.now_s += 10.0
        assert not power.allows_prefetch()
        assert power.max_active(4) == 1
    thermometer.answer("20000")
    wait_for(has_level(power, "normal"), WAIT_S)


def test_what_hangs_is_told_once_and_nothing_piles_up(clock, sensors, caplog):
    caplog.set_level(logging.INFO, logger="edge_llm")
    begun, go_on, done = threading.Event(), threading.Event(), []

    def hang() -> None:
        begun.set()
        go_on.wait(WAIT_S)

    sensors.post(hang)
    assert begun.wait(WAIT_S)
    sensors.post(lambda: done.append("in time"))
    clock.now_s += 3.0
    for _ in range(1000):
        sensors.post(lambda: done.append("left out"))
    go_on.set()
    wait_for(lambda: "the sensors answer again" in caplog.text, WAIT_S)
    assert is_idle(sensors)
    assert done == ["in time"]
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_a_reading_that_fails_does_not_end_the_thread(sensors, caplog):
    sensors.post(lambda: 1 // 0)
    assert is_idle(sensors)
    assert "a sensor could not be read" in caplog.text


def test_who_asks_waits_for_a_while_only(sensors):
    go_on = threading.Event()
    assert sensors.ask(lambda: 7, WAIT_S) == 7
    assert sensors.ask(lambda: go_on.wait(WAIT_S), 0.01) is None
    go_on.set()


def test_a_closed_thread_ends():
    before = set(threading.enumerate())
    sensors = SensorThread()
    (thread,) = set(threading.enumerate()) - before
    assert thread.daemon
    sensors.close()
    thread.join(WAIT_S)
    assert not thread.is_alive()


def test_a_rail_that_hangs_stalls_no_answer(tmp_path, sensors):
    folder = tmp_path / "sys/class/hwmon/hwmon0"
    folder.mkdir(parents=True)
    for name, text in (("in1_label", "VDD_IN"), ("in1_input", "5000"), ("curr1_input", "1500")):
        (folder / name).write_text(text)
    meter = find_meter(tmp_path)
    assert meter is not None
    (folder / "in1_input").unlink()
    volts = StalledFile(folder / "in1_input")
    metrics = Metrics()
    energy = AnswerEnergy(meter, metrics, sensors.post)
    energy.begin()
    energy.end(0.1, beside=0)
    assert metrics.counter("energy_answers") == 0
    volts.answer("5000")
    assert is_idle(sensors)
    assert (metrics.counter("energy_answers"), metrics.counter("energy_mj")) == (1, 750)


def test_a_meter_that_cannot_be_found_in_time_is_none(tmp_path, sensors):
    label = StalledFile(tmp_path / "sys/class/hwmon/hwmon0/in1_label")
    assert sensors.ask(lambda: find_meter(tmp_path), 0.01) is None
    label.answer("VDD_IN")
