"""What /sys/class says, and when it stops work that nobody waits for."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_llm.device import power
from edge_llm.device.power import Power, PowerGate, read_power

AC_ON = {"type": "Mains", "online": "1"}
AC_OFF = {"type": "Mains", "online": "0"}
USB_OFF = {"type": "USB", "online": "0"}
USB_PD = {"type": "USB", "online": "2"}


def battery(status: str, **files: str) -> dict[str, str]:
    return {"type": "Battery", "status": status, **files}


def add_supplies(root: Path, *supplies: dict[str, str]) -> None:
    for number, files in enumerate(supplies):
        folder = root / "power_supply" / f"supply{number}"
        folder.mkdir(parents=True)
        for name, text in files.items():
            (folder / name).write_text(text + "\n")


def set_temperature(root: Path, text: str, zone: int = 0) -> None:
    folder = root / "thermal" / f"thermal_zone{zone}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "temp").write_text(text + "\n")


@pytest.mark.parametrize(
    ("supplies", "expected"),
    [
        ([], None),
        ([AC_ON], False),
        ([AC_OFF], None),
        ([AC_ON, battery("Charging")], False),
        ([AC_ON, battery("Discharging")], False),
        ([AC_OFF, battery("Discharging")], True),
        ([AC_OFF, USB_OFF, battery("Discharging")], True),
        ([AC_OFF, USB_PD, battery("Charging")], False),
        ([battery("Discharging")], True),
        ([battery("Full")], False),
        ([battery("Not charging")], False),
        ([battery("Full"), battery("Discharging")], True),
        ([battery("Unknown")], None),
        ([AC_OFF, battery("Unknown")], True),
        ([{"type": "Mains"}, battery("Unknown")], None),
        ([AC_OFF, {"type": "UPS", "status": "Discharging"}], True),
        ([{"type": "Battery"}], None),
        ([{"online": "1"}], None),
        ([battery("Discharging", scope="Device")], None),
        ([battery("Discharging", scope="System")], True),
    ],
)
def test_battery(tmp_path, supplies, expected):
    add_supplies(tmp_path, *supplies)
    assert read_power(tmp_path) == Power(on_battery=expected, temperature_c=None)


@pytest.mark.parametrize(
    ("zones", "expected"),
    [
        (["45000"], 45.0),
        (["45000", "61500", "50000"], 61.5),
        (["-274000"], None),
        (["-274000", "33000"], 33.0),
        (["255000", "33000"], 33.0),
        (["-20000"], -20.0),
        (["hot", "", "33000"], 33.0),
        (["9" * 5000], None),
        (["1" + "0" * 250], None),
    ],
)
def test_the_hottest_believable_zone_counts(tmp_path, zones, expected):
    for zone, text in enumerate(zones):
        set_temperature(tmp_path, text, zone)
    assert read_power(tmp_path) == Power(on_battery=None, temperature_c=expected)


def test_a_zone_that_cannot_be_read_is_left_out(tmp_path):
    set_temperature(tmp_path, "33000")
    (tmp_path / "thermal" / "thermal_zone1" / "temp").mkdir(parents=True)
    (tmp_path / "thermal" / "cooling_device0").mkdir()
    assert read_power(tmp_path).temperature_c == 33.0


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nothing_that_a_driver_says_raises(tmp_path, data):
    supply, zone = tmp_path / "power_supply" / "x", tmp_path / "thermal" / "thermal_zone0"
    supply.mkdir(parents=True, exist_ok=True)
    zone.mkdir(parents=True, exist_ok=True)
    texts = st.one_of(st.binary(max_size=8), st.sampled_from([b"Battery", b"Mains", b"1", b"99999", b"Discharging"]))
    for file in (supply / "type", supply / "online", supply / "status", zone / "temp"):
        file.write_bytes(data.draw(texts))
    assert PowerGate(False, 80.0, root=tmp_path).allows() in (True, False)


def test_this_machine_can_be_asked():
    read_power()


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def lines(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records]


@pytest.fixture(autouse=True)
def _log(caplog):
    caplog.set_level(logging.INFO, logger="edge_llm")


def test_heat_stops_work_until_it_is_five_degrees_cooler(tmp_path, clock, caplog):
    gate = PowerGate(True, 80.0, root=tmp_path, interval_s=5.0, clock=clock)
    answers = []
    for temperature in ("79000", "80000", "80001", "80000", "76000", "75001", "75000", "79999", "80500"):
        set_temperature(tmp_path, temperature)
        clock.now_s += 5.0
        answers.append(gate.allows())
    assert answers == [True, True, False, False, False, False, True, True, False]
    assert lines(caplog) == ["prefetch pauses: too hot", "prefetch goes on", "prefetch pauses: too hot"]
    assert caplog.records[0].temperature_c == 80.001


def test_a_sensor_that_falls_silent_in_the_heat_ends_nothing(tmp_path, clock):
    gate = PowerGate(True, 80.0, root=tmp_path, clock=clock)
    set_temperature(tmp_path, "90000")
    assert not gate.allows()
    for temperature, allowed in (("-274000", False), ("60000", True), ("-274000", True)):
        set_temperature(tmp_path, temperature)
        clock.now_s += 5.0
        assert gate.allows() is allowed


def test_a_battery_stops_work_where_it_is_told_to(tmp_path, clock, caplog):
    add_supplies(tmp_path, AC_OFF, battery("Discharging"))
    assert PowerGate(True, None, root=tmp_path).allows()
    assert PowerGate(True, 80.0, root=tmp_path).allows()
    gate = PowerGate(False, None, root=tmp_path, clock=clock)
    assert not gate.allows()
    (tmp_path / "power_supply" / "supply0" / "online").write_text("1\n")
    clock.now_s += 5.0
    assert gate.allows()
    assert lines(caplog) == ["prefetch pauses: on battery", "prefetch goes on"]


def test_what_is_unknown_forbids_nothing(tmp_path, caplog):
    assert PowerGate(False, 80.0, root=tmp_path / "nothing here").allows()
    assert lines(caplog) == []


def test_an_answer_holds_for_a_while(tmp_path, clock, monkeypatch):
    reads = []
    real_read = power.read_power
    monkeypatch.setattr(power, "read_power", lambda root: (reads.append(root), real_read(root))[1])
    gate = PowerGate(False, 80.0, root=tmp_path, interval_s=5.0, clock=clock)
    set_temperature(tmp_path, "90000")
    for now_s, count in ((100.0, 1), (104.9, 1), (105.0, 2), (109.9, 2), (1000.0, 3)):
        clock.now_s = now_s
        assert not gate.allows()
        assert len(reads) == count


def test_without_limits_nothing_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(power, "read_power", lambda _: pytest.fail("read"))
    assert PowerGate(True, None, root=tmp_path).allows()
