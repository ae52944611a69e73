"""The shipped units: systemd knows every line, and what they leave open is little."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from edge_llm.config import KEY_CREDENTIAL, PASSWORD_CREDENTIAL, ServingConfig
from edge_llm.install_command import InstallOptions, install
from edge_llm.unit_files import GPU_DROP_IN, UNIT, unit_text
from tests.paths import TINY_BUNDLE

MAX_EXPOSURE = 2.0
needs_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is missing: apt-get install systemd"
)


def analyze(*arguments):
    command = ["systemd-analyze", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return result.stdout + result.stderr


def exposure(unit: Path) -> float:
    report = analyze("security", "--offline=true", "--no-pager", unit)
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", report)
    assert found, report
    return float(found[1])


def settings_of(text):
    """Every ``key=value`` of a unit, by section."""
    found, section = {}, ""
    for line in text.splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(section, {}).setdefault(key, []).append(value)
    return found


@pytest.fixture
def folder(tmp_path):
    """The shipped unit, with a command that is there."""
    text = unit_text(UNIT).replace("/opt/edge-llm/bin/edge-llm", "/bin/true")
    (tmp_path / UNIT).write_text(text)
    return tmp_path


@needs_analyze
def test_systemd_understands_every_line_of_the_unit(folder):
    assert analyze("verify", "--man=no", folder / UNIT) == ""


@needs_analyze
def test_systemd_understands_every_line_of_the_drop_ins(folder):
    drop_ins = folder / f"{UNIT}.d"
    drop_ins.mkdir()
    (drop_ins / "20-gpu.conf").write_text(unit_text(GPU_DROP_IN))
    root = folder / "root"
    flags = {"bundle": str(TINY_BUNDLE), "device": "jetson-orin-nano", "engine": {"affinity": [0, 1]}}
    install(InstallOptions(root=root, flags=flags, command="/bin/true", yes=True))
    shutil.copy(root / f"etc/systemd/system/{UNIT}.d/10-machine.conf", drop_ins)
    assert analyze("verify", "--man=no", folder / UNIT) == ""


@needs_analyze
def test_a_wrong_line_would_be_found(folder):
    with (folder / UNIT).open("a") as unit:
        unit.write("[Service]\nProtectEverything=yes\n")
    assert "ProtectEverything" in analyze("verify", "--man=no", folder / UNIT)


@needs_analyze
def test_what_the_unit_leaves_open_is_little(folder):
    assert exposure(folder / UNIT) <= MAX_EXPOSURE


@needs_analyze
def test_the_gpu_drop_in_opens_only_devices_and_what_the_driver_does_with_memory(folder):
    # systemd-analyze reads no drop-ins of a file that it is given, but the last of two values counts.
    with (folder / UNIT).open("a") as unit:
        unit.write(unit_text(GPU_DROP_IN))
    assert exposure(folder / UNIT) <= MAX_EXPOSURE
    opened = set(settings_of(unit_text(GPU_DROP_IN))["Service"])
    assert opened == {
        "TimeoutStartSec", "PrivateDevices", "DevicePolicy", "DeviceAllow", "SupplementaryGroups", "PrivateUsers",
        "MemoryDenyWriteExecute", "SystemCallFilter", "Environment",
    }  # fmt: skip


def test_the_unit_says_what_the_daemon_relies_on():
    service = settings_of(unit_text(UNIT))["Service"]
    assert service["Type"] == ["notify"]
    assert service["DynamicUser"] == ["yes"]
    assert service["Restart"] == ["on-failure"]
    assert "ORT_DISABLE_TELEMETRY=1" in service["Environment"]
    # A child process that runs out of memory is not the end of the daemon.
    assert service["OOMPolicy"] == ["continue"]
    # What users have said, and the broker's password, are in the daemon's memory.
    assert service["LimitCORE"] == ["0"]
    for setting in ("CacheDirectory", "StateDirectory", "RuntimeDirectory", "ConfigurationDirectory"):
        assert service[setting] == ["edge-llm"]
    assert service["LoadCredential"] == [
        f"{name}:/etc/edge-llm/{name}" for name in (PASSWORD_CREDENTIAL, KEY_CREDENTIAL)
    ]
    # A stop that takes its time is not cut off.
    assert int(service["TimeoutStopSec"][0].removesuffix("s")) > ServingConfig().drain_timeout_s + 5
    assert not {"MemoryMax", "CPUQuota", "AllowedCPUs"} & set(service)
