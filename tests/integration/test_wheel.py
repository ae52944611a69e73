"""What users install: the wheel, in a fresh environment, away from the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.brokers import wait_for
from tests.paths import TINY_BUNDLE

ROOT = Path(__file__).parent.parent.parent
pytestmark = [pytest.mark.broker, pytest.mark.timeout(600)]


def run(*command: str | Path, cwd: Path = Path("/"), timeout_s: float = 300, **environ: str) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "EDGE_LLM_"))}
    result = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=clean | environ,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy, so that no build output is left in the checkout.
    source = folder / "source"
    ignored = shutil.ignore_patterns(".git", ".venv", ".cache", "__pycache__", ".*_cache", "tests", "benchmarks")
    shutil.copytree(ROOT, source, ignore=ignored)
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, source)
    return next(folder.glob("edge_llm-*.whl"))


def test_the_wheel_carries_the_device_side_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "edge_llm/device_configs/default.toml" in names
    assert "edge_llm/py.typed" in names
    assert {"edge_llm/systemd/edge-llm.service", "edge_llm/systemd/edge-llm-gpu.conf"} <= set(names)
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"edge_llm"}


def test_installed_away_from_the_checkout_it_checks_itself_and_answers(wheel, tmp_path, mosquitto):
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=True)
    binaries = environment / "bin"
    run(binaries / "pip", "install", "-q", f"{wheel}[cpu]")
    installed = run(binaries / "pip", "list", "--format=freeze")
    assert not {"torch", "transformers", "onnx", "optimum"} & {line.split("==")[0] for line in installed.splitlines()}
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    edge_llm = binaries / "edge-llm"
    report = json.loads(
        run(edge_llm, "doctor", "--json", "--bundle", TINY_BUNDLE, "--port", str(mosquitto.port), **cache)
    )
    assert report["ok"]
    log = tmp_path / "serve.log"
    with log.open("wb") as stream:
        daemon = subprocess.Popen(
            [str(edge_llm), "serve", "--bundle", str(TINY_BUNDLE), "--port", str(mosquitto.port)],
            cwd="/",
            env=os.environ | cache,
            stdout=stream,
            stderr=stream,
        )
    try:
        wait_for(lambda: '"online"' in log.read_text(), 60, log.read_text)
        events = run(edge_llm, "ask", "hello", "--json", "--port", str(mosquitto.port)).splitlines()
        assert json.loads(events[-1])["type"] == "final"
    finally:
        daemon.terminate()
        assert daemon.wait(30) == 0
    for line in log.read_text().splitlines():
        json.loads(line)  # one JSON object a line, and nothing else
