"""``edge-llm doctor`` where TensorRT, faked, has no engines yet, and what it says of a Jetson's power modes."""

from __future__ import annotations

import json

import msgspec
import pytest

from edge_llm import cli
from edge_llm.bundle import tensorrt_engines
from edge_llm.config import Config, MqttConfig, PowerConfig
from edge_llm.device import power
from edge_llm.device.session import TENSORRT
from edge_llm.doctor import Check, _power, _tell_build, run_doctor
from tests.brokers import free_port
from tests.engine.test_tensorrt_loading import FakeTensorrt, config, tensorrt  # noqa: F401 - fixtures
from tests.paths import TINY_BUNDLE

ANNOUNCEMENT = "building TensorRT engines of 1 graph, which the next start finds: this takes minutes"


@pytest.fixture
def doctor(config, capsys):  # noqa: F811 - the fixture
    settings = msgspec.structs.replace(config, bundle=str(TINY_BUNDLE), mqtt=MqttConfig(port=free_port()))

    def doctor(**options):
        """The check of an answer, and what was said on stderr."""
        checks = {check.name: check for check in run_doctor(settings, **options)}
        return checks["answer"], capsys.readouterr().err

    return doctor


def test_a_build_is_announced_before_it_begins(tensorrt, doctor, monkeypatch, capsys):  # noqa: F811
    run, said = tensorrt_engines.subprocess.Popen, []

    def start(*arguments, **options):
        said.append(capsys.readouterr().err)
        return run(*arguments, **options)

    monkeypatch.setattr(tensorrt_engines.subprocess, "Popen", start)
    answer, _ = doctor()
    assert answer.ok
    assert f"on {TENSORRT}" in answer.detail
    (announced,) = said
    assert announced.startswith(ANNOUNCEMENT)
    assert "after 30 it is given up" in announced
    assert "--no-build" in announced


def test_engines_that_are_there_need_no_word(tensorrt, doctor):  # noqa: F811
    doctor()
    for options in ({}, {"build": False}):
        answer, said = doctor(**options)
        assert f"on {TENSORRT}" in answer.detail
        assert said == ""
    assert tensorrt.builds == 1


def test_without_a_build_the_next_provider_answers(tensorrt, doctor):  # noqa: F811
    answer, said = doctor(build=False)
    assert answer.ok
    assert f"; not {TENSORRT}: its engines are not built yet, and --no-build leaves that" in answer.detail
    assert (tensorrt.builds, said) == (0, "")


@pytest.mark.parametrize("flags", [(), ("--no-build",)])
def test_the_command_has_a_switch_for_it(tensorrt, tmp_path, capsys, flags):  # noqa: F811
    settings = ("cache_dir=" + json.dumps(str(tmp_path)), f'engine.providers=["{TENSORRT}", "CPUExecutionProvider"]')
    settings += (
        f'engine.targets={{{TENSORRT}=["cpu-int8"], CPUExecutionProvider=["cpu-int8"]}}',
        "engine.slots=1",
        "engine.prepare=false",
    )
    named = [argument for setting in settings for argument in ("--set", setting)]
    # No broker is there.
    arguments = ["--json", "--bundle", str(TINY_BUNDLE), "--port", str(free_port()), *named, *flags]
    assert cli.main(["doctor", *arguments]) == 1
    output = capsys.readouterr()
    report = json.loads(output.out)
    assert next(check for check in report["checks"] if check["name"] == "answer")["ok"]
    assert (tensorrt.builds, ANNOUNCEMENT in output.err) == ((0, False) if flags else (1, True))


def test_a_long_build_is_told_of_twice_a_minute(capsys):
    for count in range(1, 25):
        _tell_build("preparing", provider=TENSORRT, elapsed_s=5.01 * count, engines=1, graphs=2)
    assert capsys.readouterr().err.splitlines() == [f"  {s} s, 1 of 2 engines" for s in (30, 60, 90, 120)]


MODES_4GB = "< POWER_MODEL ID=0 NAME=10W >\n< POWER_MODEL ID=1 NAME=7W_AI >\n< POWER_MODEL ID=2 NAME=7W_CPU >\n"
MODES_8GB = "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=1 NAME=7W >\n"


@pytest.fixture
def jetson(tmp_path, monkeypatch):
    """The check of a Jetson with these modes, which is in one of them."""
    read_modes = power.nvpmodel_modes

    def jetson(conf: str, mode: int, wanted: str | None) -> Check:
        for path, text in (("var/lib/nvpmodel/status", f"pmode:{mode:04d}"), ("etc/nvpmodel.conf", conf)):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        read_mode = power.nvpmodel_mode
        monkeypatch.setattr("edge_llm.doctor.nvpmodel_mode", lambda: read_mode(tmp_path))
        monkeypatch.setattr("edge_llm.doctor.nvpmodel_modes", lambda: read_modes(tmp_path))
        return _power(Config(power=PowerConfig(nvpmodel=wanted)))

    return jetson


def test_a_board_without_the_device_files_mode_is_told_what_it_has(jetson):
    check = jetson(MODES_4GB, 0, "15W")
    assert check.ok is None
    assert "power mode 10W" in check.detail
    assert "15W, which the device file is meant for, is none of this board's: 10W, 7W_AI, 7W_CPU" in check.detail
    assert "sudo nvpmodel" not in check.detail
    assert "device file" not in jetson(MODES_4GB, 0, "10W").detail


def test_a_board_in_another_mode_than_the_device_files_is_told_to_change_it(jetson):
    assert "meant for 15W (sudo nvpmodel -m 0, or set power.nvpmodel)" in jetson(MODES_8GB, 1, "15W").detail
    assert "device file" not in jetson(MODES_8GB, 0, "15W").detail
    # Where the modes cannot be read, none is said to be missing.
    assert "meant for 15W (sudo nvpmodel -m, or set" in jetson("", 1, "15W").detail
