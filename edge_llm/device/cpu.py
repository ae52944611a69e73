"""Processor facts that the engine and the prepared copy depend on."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from edge_llm.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection

CPUINFO = Path("/proc/cpuinfo")


@functools.cache
def physical_cores() -> int:
    """Physical cores that this process may use; hyper-threads add nothing to a memory-bound decode."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = {(block.get("physical id"), block.get("core id")) for block in _cpuinfo_blocks(CPUINFO)}
    if not cores or any(core_id is None for _, core_id in cores):
        return allowed  # ARM's cpuinfo names no cores, and its boards have no hyper-threads
    return max(1, min(allowed, len(cores)))


@functools.cache
def cpu_features() -> str:
    """The instruction-set flags, sorted: which kernels ONNX Runtime picks, and so the layout of prepacked weights."""
    return " ".join([platform.machine(), *sorted(cpu_flags(CPUINFO))])


def cpu_flags(cpuinfo: Path) -> frozenset[str]:
    """The instruction-set flags of the first processor that a ``/proc/cpuinfo`` names any for."""
    for block in _cpuinfo_blocks(cpuinfo):
        flags = block.get("flags") or block.get("Features")
        if flags:
            return frozenset(flags.split())
    return frozenset()


def use_cores(cores: Collection[int]) -> None:
    """Keep this process, and the threads that it starts from now on, to some processors; none leaves it as it is.

    Raises:
        ConfigError: the system does not let us have one of them.
    """
    if not cores:
        return
    try:
        os.sched_setaffinity(0, cores)
    except (OSError, AttributeError) as error:
        raise ConfigError(f"engine.affinity: cannot use the processors {sorted(cores)}: {error}") from None
    physical_cores.cache_clear()


def has_int8_dot_product() -> bool | None:
    """Whether int8 weights run on dot-product instructions; None where the system does not say."""
    features = cpu_features().split()
    machine, flags = features[0], set(features[1:])
    if not flags:
        return None
    if machine in ("x86_64", "AMD64"):
        return "avx2" in flags
    return "asimddp" in flags


def _cpuinfo_blocks(cpuinfo: Path) -> list[dict[str, str]]:
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    blocks = []
    for paragraph in text.split("\n\n"):
        pairs = (line.partition(":") for line in paragraph.splitlines() if ":" in line)
        block = {key.strip(): value.strip() for key, _, value in pairs}
        if "processor" in block:
            blocks.append(block)
    return blocks
