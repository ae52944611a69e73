"""Files that are built once: written under a temporary name and renamed, so that what is there is whole."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from edge_llm.config import user_cache_dir


def default_cache_dir() -> Path:
    """Where models lie unless ``--cache-dir`` says otherwise; about 2 GB with every peer."""
    return user_cache_dir() / "benchmarks"


def built(path: Path, build: Callable[[Path], None]) -> Path:
    """``path``, built first if it is not there; ``build`` gets the path to write to."""
    if not path.exists():
        print(f"building {path.name} …", file=sys.stderr)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
            target = Path(folder) / path.name
            build(target)
            try:
                target.rename(path)
            except OSError:
                if not path.exists():  # otherwise another process has just built the same
                    raise
    return path


def run_module(module: str, *arguments: str | Path) -> None:
    """Run a Python module of this project in a process of its own, so that its memory and its chatter go with it.

    On a terminal its progress is shown.

    Raises:
        RuntimeError: it failed; the message is the last line that it wrote.
    """
    shown = sys.stderr.isatty()
    result = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=Path(__file__).parent.parent.parent,
        stdout=subprocess.DEVNULL,
        stderr=None if shown else subprocess.PIPE,
        check=False,
    )
    if result.returncode != 0:
        lines = (result.stderr or b"").decode(errors="replace").strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"python -m {module} ended with status {result.returncode}")


def source_key(*paths: Path) -> str:
    """A hash of Python files, or of all those in folders: what they wrote is stale when they change."""
    digest = hashlib.sha256()
    for file in sorted(file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path])):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def evict(folder: Path) -> None:
    """Drop the files in ``folder`` from the page cache, as after a boot; pages that a process has mapped stay.

    How a file came into the cache decides how large its pages are there, and with them how fast mapped weights are
    read: several percent of a decode step. So every engine reads its files anew, in its own way.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())  # dirty pages would stay
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def remove_others(keep: Path, prefix: str) -> None:
    """Delete earlier builds: the neighbours of ``keep`` whose names begin with ``prefix``."""
    for path in keep.parent.iterdir():
        if path == keep or not path.name.startswith(prefix):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
