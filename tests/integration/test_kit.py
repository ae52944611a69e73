"""A kit for a board without a network: it resolves, packs, and installs with no index at all."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from export import kit
from export.errors import ExportError
from export.kit import KitOptions, make_kit

TINY = Path(__file__).parent.parent / "data" / "tiny_bundle"
DEVICE_CONFIGS = Path(__file__).parent.parent.parent / "device_configs"
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
NO_INDEX = {**os.environ, "PIP_NO_INDEX": "1", "PIP_INDEX_URL": "http://127.0.0.1:9/", "PYTHON": sys.executable}
# Compiling every module of the wheels takes longer than all the rest, and one test that does so is enough.
QUICK = {**NO_INDEX, "PIP_NO_COMPILE": "1"}

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kit")
    archive = folder / "kit.tar.gz"
    make_kit(KitOptions(platform.machine(), TINY, archive, (PYTHON,)))
    with tarfile.open(archive) as stream:
        assert {(entry.uid, entry.uname) for entry in stream} == {(0, "root")}
        stream.extractall(folder, filter="data")
    (inside,) = folder.glob("edge-llm-kit-*")
    return inside


@pytest.fixture(scope="module")
def visible_bundle() -> Iterator[Path]:
    """A bundle where the service can see it, wherever the checkout and pytest's folders lie."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(shutil.copytree(TINY, Path(folder) / "bundle"))


def install(
    kit_folder: Path, *arguments: Path | str, environment: dict[str, str] = QUICK
) -> subprocess.CompletedProcess[str]:
    command = ["sh", str(kit_folder / "install.sh"), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_it_installs_without_an_index_and_answers(unpacked, tmp_path):
    target = tmp_path / "opt"
    result = install(unpacked, target, environment=NO_INDEX)
    assert result.returncode == 0, result.stderr
    assert "edge-llm serve --bundle" in result.stdout
    doctor = [str(target / "venv/bin/edge-llm"), "doctor", "--json", "--bundle", str(target / "bundle"), "--port", "9"]
    doctor += ["--set", f"cache_dir={target / 'cache'}"]
    report = json.loads(subprocess.run(doctor, capture_output=True, text=True, check=False).stdout)
    checks = {check["name"]: check for check in report["checks"]}
    assert checks["answer"]["ok"], checks["answer"]
    assert "prepared copy" in checks["answer"]["detail"]
    # Whatever else is there is not the kit's to remove.
    (target / "notes.txt").touch()
    removed = install(unpacked, "--uninstall", target)
    assert removed.returncode == 0, removed.stderr
    assert "holds files that are not from the kit" in removed.stdout
    assert files(target) == {"notes.txt"}


def test_the_wheel_carries_the_units_and_the_device_files(unpacked):
    (own,) = (unpacked / "wheels").glob("edge_llm-*.whl")
    names = set(zipfile.ZipFile(own).namelist())
    assert {"edge_llm/systemd/edge-llm.service", "edge_llm/systemd/edge-llm-gpu.conf"} <= names
    assert {f"edge_llm/device_configs/{path.name}" for path in DEVICE_CONFIGS.glob("*.toml")} <= names


def test_it_becomes_a_service_through_edge_llm_install_and_goes_again(unpacked, visible_bundle, tmp_path):
    root, target = tmp_path / "root", tmp_path / "opt"
    image = ("--root", root, "--device", "x86-64")
    # The service would not see a bundle under /tmp; what edge-llm install refuses leaves nothing.
    refused = install(unpacked, "--service", target, "--", *image)
    assert refused.returncode != 0
    assert "which the service cannot see" in refused.stderr
    assert not target.exists()
    assert not files(tmp_path)

    result = install(unpacked, "--service", target, "--", *image, "--bundle", visible_bundle, "--node", "car7")
    assert result.returncode == 0, result.stderr
    unit = root / "etc/systemd/system/edge-llm.service"
    assert unit.read_text() == (DEVICE_CONFIGS.parent / "systemd/edge-llm.service").read_text()
    assert 'node = "car7"' in (root / "etc/edge-llm/config.toml").read_text()

    removed = install(unpacked, "--uninstall", target, "--", "--root", root)
    assert removed.returncode == 0, removed.stderr
    assert not files(tmp_path)
    assert not target.exists()


def test_a_service_that_the_program_itself_made_goes_first(unpacked, visible_bundle, tmp_path):
    root, target = tmp_path / "root", tmp_path / "opt"
    assert install(unpacked, target).returncode == 0
    program = target / "venv/bin/edge-llm"
    command = [
        program,
        "install",
        "--yes",
        "--root",
        root,
        "--device",
        "x86-64",
        "--bundle",
        visible_bundle,
    ]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    record, unit = root / "etc/edge-llm/install.json", root / "etc/systemd/system/edge-llm.service"
    written = record.read_bytes()

    # Where the service cannot be removed, the program that it starts stays.
    record.write_text("?")
    kept = install(unpacked, "--uninstall", target, "--", "--root", root)
    assert kept.returncode == 1
    assert "the service stays" in kept.stderr
    assert program.exists()
    assert unit.exists()

    # A unit that was removed by hand keeps nothing.
    record.write_bytes(written)
    unit.unlink()
    removed = install(unpacked, "--uninstall", os.path.relpath(target), "--", f"--root={root}")
    assert removed.returncode == 0, removed.stderr
    assert not files(tmp_path)
    assert not target.exists()


def kit_folder_with(target: Path, root: Path, program_name: str) -> Path:
    """What the installer looks at: a program that only says how it was called, and a unit that starts another one."""
    program = target / "venv/bin/edge-llm"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\necho "called: $*"\nrm {root}/etc/systemd/system/edge-llm.service\nexit 1\n')
    program.chmod(0o755)
    (target / ".edge-llm-kit").touch()
    drop_in = root / "etc/systemd/system/edge-llm.service.d/10-machine.conf"
    drop_in.parent.mkdir(parents=True)
    drop_in.write_text(f"[Service]\nExecStart=\nExecStart={program_name} serve\n")
    (root / "etc/systemd/system/edge-llm.service").touch()
    return target


@pytest.mark.parametrize(
    ("name", "called"), [("{target}/venv/bin/edge-llm", True), ("/srv{target}/venv/bin/edge-llm", False)]
)
def test_a_service_is_known_by_the_program_that_it_starts(unpacked, tmp_path, name, called):
    root = tmp_path / "root"
    target = kit_folder_with(tmp_path / "opt", root, name.format(target=tmp_path / "opt"))
    removed = install(unpacked, "--uninstall", target, "--", "--root", root)
    assert removed.returncode == 0, removed.stderr
    # It failed, but only after the unit had gone.
    assert (f"called: install --uninstall --yes --root {root}" in removed.stdout) is called
    assert (root / "etc/systemd/system/edge-llm.service").exists() is not called
    assert not target.exists()


def test_a_service_that_fails_half_way_leaves_no_units(unpacked, visible_bundle, tmp_path):
    root, target = tmp_path / "root", tmp_path / "opt"
    (root / "etc/systemd/system/edge-llm.service.d/10-machine.conf.partial").mkdir(parents=True)
    settings = ("--root", root, "--device", "x86-64", "--bundle", visible_bundle)
    result = install(unpacked, "--service", target, "--", *settings)
    assert result.returncode != 0
    assert "remove   /etc/systemd/system/edge-llm.service" in result.stdout
    assert not files(tmp_path)
    assert not target.exists()


def test_a_folder_of_somebody_else_is_not_removed(unpacked, tmp_path):
    target = tmp_path / "opt"
    program = target / "venv/bin/edge-llm"
    program.parent.mkdir(parents=True)
    program.touch(0o755)
    result = install(unpacked, "--uninstall", target)
    assert result.returncode == 1
    assert "nothing was installed into" in result.stderr
    assert program.exists()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_installation_leaves_nothing(unpacked, tmp_path, number):
    target, python = tmp_path / "opt", tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && echo {PYTHON} || exec sleep 60\n')
    python.chmod(0o755)
    # A shell cannot trap what whoever runs the tests ignores.
    command = ["env", "--default-signal", "sh", str(unpacked / "install.sh"), str(target)]
    environment = {**NO_INDEX, "PYTHON": str(python)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        deadline = time.monotonic() + 60
        while not (target / ".edge-llm-kit").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(process.pid, number)
    assert process.returncode == 128 + number
    assert not target.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--remove",), "there is no --remove"),
        (("{target}", "--", "--node", "car7"), "give --service first"),
        (("--uninstall", "{target}"), "nothing was installed into"),
    ],
)
def test_a_wrong_call_does_nothing(unpacked, tmp_path, arguments, message):
    target = tmp_path / "opt"
    result = install(unpacked, *(argument.format(target=target) for argument in arguments))
    assert result.returncode == 1
    assert message in result.stderr
    assert not target.exists()


def damaged(unpacked: Path, tmp_path: Path, name: str, old: str, new: str) -> Path:
    copy = Path(shutil.copytree(unpacked, tmp_path / "kit"))
    path = copy / name
    path.write_text(path.read_text().replace(old, new))
    if name == "install.sh":  # so that it is not the hash that is complained about
        kit._write_hashes(copy)
        sums = copy / "SHA256SUMS"
        sums.write_text("".join(f"{line}\n" for line in sums.read_text().splitlines() if "SHA256SUMS" not in line))
    return copy


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("bundle/manifest.json", "{", "{ ", "the kit is damaged: copy it again"),
        ("install.sh", platform.machine(), "vax", f"this kit is for vax, and this machine is {platform.machine()}"),
        ("install.sh", PYTHON, "2.7", "this kit has wheels for Python 2.7"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_left(unpacked, tmp_path, name, old, new, message):
    result = install(damaged(unpacked, tmp_path, name, old, new), tmp_path / "opt")
    assert result.returncode == 1
    assert message in result.stderr
    assert not (tmp_path / "opt").exists()


def test_a_folder_that_is_there_is_not_touched(unpacked, tmp_path):
    (tmp_path / "opt").mkdir()
    result = install(unpacked, tmp_path / "opt")
    assert result.returncode == 1
    assert "exists already" in result.stderr


def test_a_failed_installation_leaves_nothing(unpacked, tmp_path):
    copy = Path(shutil.copytree(unpacked, tmp_path / "kit"))
    for wheel in (copy / "wheels").glob("numpy-*"):
        wheel.unlink()
    (copy / "SHA256SUMS").unlink()
    kit._write_hashes(copy)
    assert install(copy, tmp_path / "opt").returncode != 0
    assert not (tmp_path / "opt").exists()


@pytest.mark.parametrize("python", ["3.10", "3.12"])
def test_every_wheel_exists_for_arm(unpacked, tmp_path, python):
    (own,) = (unpacked / "wheels").glob("edge_llm-*.whl")
    kit._download(own, python, "aarch64", tmp_path)
    names = {wheel.name.split("-")[0] for wheel in tmp_path.glob("*.whl")}
    assert {"onnxruntime", "numpy", "tokenizers", "msgspec", "paho_mqtt"} <= names
    assert not [wheel for wheel in tmp_path.iterdir() if "x86_64" in wheel.name]


def test_wheels_that_do_not_exist_are_named(unpacked, tmp_path):
    (own,) = (unpacked / "wheels").glob("edge_llm-*.whl")
    with pytest.raises(ExportError, match=r"there are no wheels for Python 3\.4 on aarch64"):
        kit._download(own, "3.4", "aarch64", tmp_path)


def test_input_is_checked_before_anything_is_built(tmp_path):
    archive = tmp_path / "kit.tar.gz"
    with pytest.raises(ExportError, match="is not a wheel file"):
        make_kit(KitOptions("aarch64", TINY, archive, extra_wheels=(tmp_path / "none.whl",)))
    archive.touch()
    with pytest.raises(ExportError, match="exists already"):
        make_kit(KitOptions("aarch64", TINY, archive))
