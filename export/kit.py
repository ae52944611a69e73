"""``python -m export kit``: everything that a board needs which never sees a network, in one archive.

::

    edge-llm-kit-VERSION-ARCH/
        install.sh          checks the hashes, makes an environment, installs, prepares; --service, --uninstall
        SHA256SUMS          of every other file
        wheels/             edge_llm and all that it needs, for each Python version
        extra/              wheels of the board's maker, given with --extra-wheel
        bundle/

The wheels are resolved for the board's architecture by ``pip download --only-binary=:all:``, so nothing is compiled
there. Device files and units travel inside edge_llm's own wheel, and the installer leaves what concerns the machine to
``edge-llm install``; it only does by itself what comes before that can run.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from edge_llm import __version__
from edge_llm.bundle.manifest import Bundle
from export.console import say
from export.errors import ExportError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from edge_llm.arguments import OneLineParser

ARCHITECTURES: Final = ("aarch64", "x86_64")
# JetPack 6 and 7; Raspberry Pi OS 12 and 13.
DEFAULT_PYTHONS: Final = ("3.10", "3.12")
# glibc 2.28 and older: Ubuntu 20.04, Debian 10 and all later ones (PEP 600).
_PLATFORMS: Final = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")
_PROJECT: Final = Path(__file__).parent.parent
_INSTALLER: Final = Path(__file__).parent / "data" / "kit_install.sh"
_PIP_TIMEOUT_S: Final = 1200


@dataclass(frozen=True)
class KitOptions:
    """What goes into a kit.

    Attributes:
        architecture: of the board, as ``uname -m`` says it.
        bundle: the bundle's folder.
        out: the archive to write.
        pythons: versions that the board may have.
        extra_wheels: installed in place of onnxruntime, such as NVIDIA's onnxruntime-gpu for a Jetson.
    """

    architecture: str
    bundle: Path
    out: Path
    pythons: Sequence[str] = DEFAULT_PYTHONS
    extra_wheels: Sequence[Path] = ()


def add_kit_parser(commands: argparse._SubParsersAction[OneLineParser]) -> None:
    """Add the command to ``python -m export``."""
    parser = commands.add_parser("kit", help="pack everything for a board that never sees a network")
    parser.add_argument("--arch", required=True, choices=ARCHITECTURES, help="the board's, as `uname -m` says it")
    parser.add_argument("--bundle", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: edge-llm-kit-VERSION-ARCH.tar.gz")
    parser.add_argument(
        "--python",
        action="append",
        metavar="X.Y",
        help=f"a Python that the board may have; may be repeated (default: {' and '.join(DEFAULT_PYTHONS)})",
    )
    parser.add_argument(
        "--extra-wheel",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="installed in place of onnxruntime, such as NVIDIA's onnxruntime-gpu for a Jetson; may be repeated",
    )


def run_kit(arguments: argparse.Namespace) -> Path:
    """Write the archive; returns its path. Raises ``ExportError`` for anything wrong with the input."""
    out = arguments.out or Path(f"{_name(arguments.arch)}.tar.gz")
    pythons = tuple(arguments.python or DEFAULT_PYTHONS)
    options = KitOptions(arguments.arch, arguments.bundle, out, pythons, tuple(arguments.extra_wheel))
    make_kit(options)
    return options.out


def make_kit(options: KitOptions) -> None:
    """Collect, hash and pack.

    Raises:
        BundleError: the bundle is damaged.
        ExportError: a wheel cannot be had for the board, or the archive cannot be written.
    """
    _check(options)
    with tempfile.TemporaryDirectory(prefix="edge-llm-kit-") as temporary:
        folder = Path(temporary) / _name(options.architecture)
        wheels = folder / "wheels"
        wheels.mkdir(parents=True)
        own = _build_wheel(wheels)
        for python in options.pythons:
            say(f"wheels for Python {python} on {options.architecture}")
            _download(own, python, options.architecture, wheels)
        shutil.copytree(options.bundle, folder / "bundle")
        (folder / "extra").mkdir()
        for wheel in options.extra_wheels:
            shutil.copy2(wheel, folder / "extra")
        _write_installer(folder, options)
        _write_hashes(folder)
        _pack(folder, options.out)


def _check(options: KitOptions) -> None:
    Bundle.open(options.bundle).verify()
    for wheel in options.extra_wheels:
        if not wheel.is_file() or wheel.suffix != ".whl":
            raise ExportError(f"--extra-wheel {wheel} is not a wheel file")
    if options.out.exists():
        raise ExportError(f"{options.out} exists already: remove it, or name another file with --out")
    if not (_PROJECT / "pyproject.toml").is_file():
        raise ExportError("a kit is made from a checkout of the project: there is no pyproject.toml here")


def _name(architecture: str) -> str:
    return f"edge-llm-kit-{__version__}-{architecture}"


def _build_wheel(folder: Path) -> Path:
    _pip(
        "wheel", "--no-deps", "--wheel-dir", str(folder), str(_PROJECT), problem="edge_llm's own wheel cannot be built"
    )
    (wheel,) = folder.glob("edge_llm-*.whl")
    return wheel


def _download(own: Path, python: str, architecture: str, folder: Path) -> None:
    platforms = [f"--platform={name}_{architecture}" for name in _PLATFORMS]
    _pip(
        "download",
        "--only-binary=:all:",
        "--implementation=cp",
        f"--python-version={python}",
        *platforms,
        f"--dest={folder}",
        f"edge-llm[cpu,signing] @ {own.resolve().as_uri()}",
        problem=f"there are no wheels for Python {python} on {architecture}",
    )


def _pip(*arguments: str, problem: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise ExportError(f"{problem}: pip has not ended after {_PIP_TIMEOUT_S} s") from None
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip()] or [f"exit status {result.returncode}"]
        raise ExportError(f"{problem}: {lines[-1]}")


def _write_installer(folder: Path, options: KitOptions) -> None:
    text = _INSTALLER.read_text(encoding="utf-8")
    text = text.replace("@ARCH@", options.architecture).replace("@PYTHONS@", " ".join(options.pythons))
    installer = folder / "install.sh"
    installer.write_text(text, encoding="utf-8")
    installer.chmod(0o755)


def _write_hashes(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder)}\n" for path in files]
    (folder / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")


def _pack(folder: Path, out: Path) -> None:
    partial = out.with_name(f"{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(partial, "w:gz") as archive:
            archive.add(folder, folder.name, filter=_anonymous)
        partial.replace(out)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ExportError(f"{out} cannot be written: {error.strerror}") from None


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Whoever made the kit is of no concern to the board."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = "root"
    return entry
