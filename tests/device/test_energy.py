from __future__ import annotations

from pathlib import Path

import pytest

from edge_llm.device.energy import AnswerEnergy, CounterMeter, find_meter
from edge_llm.metrics import Metrics


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")


INA3221 = {
    "sys/class/hwmon/hwmon3/in1_label": "VDD_IN",
    "sys/class/hwmon/hwmon3/in1_input": "5000",
    "sys/class/hwmon/hwmon3/curr1_input": "1500",
    "sys/class/hwmon/hwmon3/in2_label": "VDD_CPU_GPU_CV",
    "sys/class/hwmon/hwmon3/in2_input": "5000",
    "sys/class/hwmon/hwmon3/curr2_input": "700",
}
RAPL = {
    "sys/class/powercap/intel-rapl:0/name": "package-0",
    "sys/class/powercap/intel-rapl:0/energy_uj": "1000000",
    "sys/class/powercap/intel-rapl:0/max_energy_range_uj": "10000000",
    "sys/class/powercap/intel-rapl:0:0/name": "core",
    "sys/class/powercap/intel-rapl:0:0/energy_uj": "5",
}


def test_a_jetson_measures_the_whole_module(tmp_path):
    write(tmp_path, {**INA3221, **RAPL})
    meter = find_meter(tmp_path)
    assert meter is not None
    assert (meter.name, meter.power_w()) == ("VDD_IN", 7.5)


def test_a_rail_in_microwatts(tmp_path):
    write(tmp_path, {"sys/class/hwmon/hwmon0/power1_label": "vin", "sys/class/hwmon/hwmon0/power1_input": "4200000"})
    meter = find_meter(tmp_path)
    assert meter is not None
    assert meter.power_w() == 4.2


def test_a_counter_that_wraps_around(tmp_path):
    write(tmp_path, RAPL)
    now_s = [10.0]
    meter = CounterMeter(tmp_path / "sys/class/powercap/intel-rapl:0", lambda: now_s[0])
    assert meter.power_w() is None
    meter.begin()
    write(tmp_path, {"sys/class/powercap/intel-rapl:0/energy_uj": "4000000"})
    now_s[0] = 12.0
    assert meter.power_w() == 1.5
    write(tmp_path, {"sys/class/powercap/intel-rapl:0/energy_uj": "500000"})
    assert meter.power_w() == 4.75


@pytest.mark.parametrize(
    "files",
    [{}, {"sys/class/hwmon/hwmon0/in1_label": "VDD_CPU"}, {**INA3221, **{"sys/class/hwmon/hwmon3/in1_input": "?"}}],
)
def test_no_meter(tmp_path, files):
    write(tmp_path, files)
    assert find_meter(tmp_path) is None


def test_a_counter_that_only_root_may_read_is_none(tmp_path):
    write(tmp_path, {"sys/class/powercap/intel-rapl:0/name": "package-0"})
    assert find_meter(tmp_path) is None


def test_answers_share_what_is_drawn(tmp_path):
    write(tmp_path, INA3221)
    metrics = Metrics()
    meter = find_meter(tmp_path)
    assert meter is not None
    energy = AnswerEnergy(meter, metrics)
    assert metrics.snapshot()["gauges"]["energy_per_answer_mj"] == 0.0
    energy.begin()
    energy.end(0.1, beside=0)
    energy.end(0.1, beside=2)
    assert metrics.counter("energy_mj") == 750 + 250
    assert metrics.snapshot()["gauges"]["energy_per_answer_mj"] == 500.0
    write(tmp_path, {"sys/class/hwmon/hwmon3/in1_input": "gone"})
    energy.end(0.1, beside=0)
    assert metrics.counter("energy_answers") == 2
