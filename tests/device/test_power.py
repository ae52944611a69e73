"""What /sys says about heat and supply, and what gives way."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_llm.config import PowerConfig
from edge_llm.device import power
from edge_llm.device.power import Power, PowerMonitor, nvpmodel_mode, read_power

AC_ON = {"type": "Mains", "online": "1"}
AC_OFF = {"type": "Mains", "online": "0"}
USB_OFF = {"type": "USB", "online": "0"}
USB_PD = {"type": "USB", "online": "2"}


def battery(status: str, **files: str) -> dict[str, str]:
    return {"type": "Battery", "status": status, **files}


def add_supplies(root: Path, *supplies: dict[str, str]) -> None:
    for number, files in enumerate(supplies):
        folder = root / "sys/class/power_supply" / f"supply{number}"
        folder.mkdir(parents=True)
        for name, text in files.items():
            (folder / name).write_text(text + "\n")


def set_temperature(root: Path, text: str, zone: int = 0) -> None:
    folder = root / "sys/class/thermal" / f"thermal_zone{zone}"
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
    (tmp_path / "sys/class/thermal" / "thermal_zone1" / "temp").mkdir(parents=True)
    (tmp_path / "sys/class/thermal" / "cooling_device0").mkdir()
    assert read_power(tmp_path).temperature_c == 33.0


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_nothing_that_a_driver_says_raises(tmp_path, data):
    sys = tmp_path / "sys"
    supply, zone = sys / "class/power_supply/x", sys / "class/thermal/thermal_zone0"
    cooling, cpu = sys / "class/thermal/cooling_device0", sys / "devices/system/cpu/cpu0/thermal_throttle"
    firmware = sys / "devices/platform/soc/soc:firmware"
    for folder in (supply, zone, cooling, cpu, firmware):
        folder.mkdir(parents=True, exist_ok=True)
    texts = st.one_of(st.binary(max_size=8), st.sampled_from([b"Battery", b"Mains", b"1", b"99999", b"Discharging"]))
    files = [supply / "type", supply / "online", supply / "status", zone / "temp", cooling / "type"]
    for file in [*files, cooling / "cur_state", cpu / "core_throttle_count", firmware / "get_throttled"]:
        file.write_bytes(data.draw(texts))
    assert PowerMonitor(PowerConfig(), False, root=tmp_path).allows_prefetch() in (True, False)


def cooling_device(root: Path, kind: str, state: str, number: int = 0) -> None:
    folder = root / f"sys/class/thermal/cooling_device{number}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "type").write_text(f"{kind}\n")
    (folder / "cur_state").write_text(f"{state}\n")


@pytest.mark.parametrize(
    ("kind", "state", "expected"),
    [
        ("Processor", "0", False),
        ("Processor", "2", True),
        ("cpufreq-cpu0", "1", True),
        ("thermal-devfreq-0", "1", True),
        ("pwm-fan", "3", None),
        ("cpufreq-cpu0", "-", None),
    ],
)
def test_a_processor_that_is_slowed_down(tmp_path, kind, state, expected):
    cooling_device(tmp_path, kind, state)
    cooling_device(tmp_path, "Fan", "1", number=1)
    assert read_power(tmp_path).throttled is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0\n", False), ("50000\n", False), ("1", False), ("50002", True), ("e0008", True), ("?", None)],
)
def test_a_raspberry_pi_says_what_is_now(tmp_path, text, expected):
    folder = tmp_path / "sys/devices/platform/soc/soc:firmware"
    folder.mkdir(parents=True)
    (folder / "get_throttled").write_text(text)
    assert read_power(tmp_path).throttled is expected


def set_throttle_counts(root: Path, *counts: int) -> None:
    for number, count in enumerate(counts):
        folder = root / f"sys/devices/system/cpu/cpu{number}/thermal_throttle"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "core_throttle_count").write_text(f"{count}\n")


def test_throttle_counts_are_added_up(tmp_path):
    set_throttle_counts(tmp_path, 3, 4)
    (tmp_path / "sys/devices/system/cpu/cpufreq").mkdir()
    assert read_power(tmp_path).throttle_count == 7


@pytest.mark.parametrize(
    ("status", "conf", "expected"),
    [
        ("pmode:0002 fmode:quiet", "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=2 NAME=MODE_30W >", "MODE_30W"),
        ("pmode:0001", "", "mode 1"),
        ("", "< POWER_MODEL ID=0 NAME=MAXN >", None),
    ],
)
def test_the_power_mode_of_a_jetson(tmp_path, status, conf, expected):
    for path, text in (("var/lib/nvpmodel/status", status), ("etc/nvpmodel.conf", conf)):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(text)
    assert nvpmodel_mode(tmp_path) == expected


def test_a_board_without_power_modes(tmp_path):
    assert nvpmodel_mode(tmp_path) is None


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


def monitor(root: Path, clock: Clock, *, on_battery_allowed: bool = True, **config) -> PowerMonitor:
    return PowerMonitor(PowerConfig(**{"warm_c": 70.0, "hot_c": 80.0, **config}), on_battery_allowed, root, clock)


def levels(root: Path, clock: Clock, gate: PowerMonitor, temperatures) -> list[str]:
    seen = []
    for temperature_c in temperatures:
        set_temperature(root, str(round(temperature_c * 1000)))
        clock.now_s += 5.0
        gate.refresh()
        seen.append(gate.level)
    return seen


def test_levels_rise_at_once_and_fall_five_degrees_lower(tmp_path, clock, caplog):
    gate = monitor(tmp_path, clock)
    changes = []
    gate.on_change = changes.append
    temperatures = [69.9, 70, 65.1, 65, 64.9, 81, 75.1, 75, 74.9, 66, 64]
    expected = ["normal", "warm", "warm", "warm", "normal", "hot", "hot", "hot", "warm", "warm", "normal"]
    assert levels(tmp_path, clock, gate, temperatures) == expected
    assert changes == ["warm", "normal", "hot", "warm", "normal"]
    assert lines(caplog) == [f"the machine is {level}" for level in changes]
    assert caplog.records[0].temperature_c == 70.0


def test_a_temperature_that_swings_around_a_threshold_does_not_flap(tmp_path, clock):
    gate = monitor(tmp_path, clock)
    changes = []
    gate.on_change = changes.append
    levels(tmp_path, clock, gate, [79, 81] * 200)
    assert changes == ["warm", "hot"]


def test_what_gives_way(tmp_path, clock):
    gate = monitor(tmp_path, clock, hot_max_tokens=48)
    given = []
    for temperature_c in (20, 72, 82):
        levels(tmp_path, clock, gate, [temperature_c])
        given.append((gate.allows_prefetch(), gate.max_active(4), gate.max_tokens(160), gate.max_tokens(30)))
    assert given == [(True, 4, 160, 30), (False, 4, 160, 30), (False, 1, 48, 30)]


def test_throttling_makes_it_warm_for_a_while(tmp_path, clock):
    gate = monitor(tmp_path, clock)
    set_throttle_counts(tmp_path, 7)
    assert levels(tmp_path, clock, gate, [50]) == ["normal"]  # what happened before the start does not count
    set_throttle_counts(tmp_path, 8)
    assert levels(tmp_path, clock, gate, [50] * 8) == ["warm"] * 6 + ["normal"] * 2
    cooling_device(tmp_path, "cpufreq-cpu0", "1")
    assert levels(tmp_path, clock, gate, [50] * 12) == ["warm"] * 12


def test_throttling_every_ten_seconds_does_not_flap(tmp_path, clock):
    gate = monitor(tmp_path, clock)
    changes = []
    gate.on_change = changes.append
    for count in range(100):
        set_throttle_counts(tmp_path, count // 2)
        levels(tmp_path, clock, gate, [60])
    assert changes == ["warm"]


def test_a_sensor_that_falls_silent_in_the_heat_ends_nothing(tmp_path, clock):
    gate = monitor(tmp_path, clock)
    assert levels(tmp_path, clock, gate, [90, -274, 60, -274]) == ["hot", "hot", "normal", "normal"]


def test_a_battery_stops_prefetch_where_it_is_told_to(tmp_path, clock, caplog):
    add_supplies(tmp_path, AC_OFF, battery("Discharging"))
    assert monitor(tmp_path, clock).allows_prefetch()
    gate = monitor(tmp_path, clock, on_battery_allowed=False)
    assert not gate.allows_prefetch()
    assert gate.level == "normal"
    (tmp_path / "sys/class/power_supply/supply0/online").write_text("1\n")
    clock.now_s += 5.0
    assert gate.allows_prefetch()
    assert lines(caplog) == ["on battery: nothing is prefetched", "off battery: prefetch goes on"]


def test_what_is_unknown_forbids_nothing(tmp_path, clock, caplog):
    assert monitor(tmp_path / "nothing here", clock, on_battery_allowed=False).allows_prefetch()
    assert lines(caplog) == []


def test_a_reading_holds_for_a_while(tmp_path, clock, monkeypatch):
    reads = []
    real_read = power.read_power
    monkeypatch.setattr(power, "read_power", lambda root: (reads.append(root), real_read(root))[1])
    gate = monitor(tmp_path, clock)
    set_temperature(tmp_path, "90000")
    for now_s, count in ((100.0, 1), (104.9, 1), (105.0, 2), (109.9, 2), (1000.0, 3)):
        clock.now_s = now_s
        assert not gate.allows_prefetch()
        assert len(reads) == count


def test_without_limits_nothing_is_read(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(power, "read_power", lambda _: pytest.fail("read"))
    assert monitor(tmp_path, clock, warm_c=None, hot_c=None).allows_prefetch()
