"""Where a benchmark ran and what with: figures without these mean nothing."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any, Final

from edge_llm.device.cpu import cpu_features, physical_cores

# What decides which integer kernels run.
_INT8_FEATURES: Final = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "asimddp",
    "i8mm",
    "sve",
)


def describe_machine(threads: int, packages: tuple[str, ...]) -> dict[str, Any]:
    """Processor, memory, system, versions of ``packages``, the project's commit, and how busy the machine was."""
    return {
        "cpu": _cpu_model(),
        "arch": platform.machine(),
        "cores": physical_cores(),
        "threads": threads,
        "features": [feature for feature in _INT8_FEATURES if feature in cpu_features().split()],
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in packages},
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def version_of(package: str) -> str | None:
    """Installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def format_machine(machine: dict[str, Any]) -> str:
    """The description as lines for people."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    return (
        f"{machine['cpu']} ({machine['arch']}), {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['memory_gb']} GB, {', '.join(machine['features'])}\n"
        f"{machine['system']}, Python {machine['python']}, {versions}\n"
        f"edge_llm commit {machine['commit']}, {machine['date']}, load average before {machine['load_average']}"
    )


def _cpu_model() -> str:
    try:
        found = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or "unknown"


def _commit() -> str:
    """Short commit of the checkout, "-dirty" with uncommitted changes, "unknown" outside of one."""
    root = Path(__file__).parent.parent
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return result.stdout.strip()
