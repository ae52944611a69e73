"""``edge-llm doctor``: is this machine, this bundle and this broker fit to serve? One line each."""

from __future__ import annotations

import contextlib
import platform
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort

from edge_llm import __version__
from edge_llm.bundle.manifest import Bundle
from edge_llm.bundle.shipped import shipped_bundle
from edge_llm.cache_command import recent_finding
from edge_llm.device.cpu import has_int8_dot_product, physical_cores
from edge_llm.device.providers import choose_provider
from edge_llm.engine.loading import load_model
from edge_llm.errors import BundleNotFoundError, EdgeLlmError
from edge_llm.mqtt.asking import Asker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from edge_llm.config import Config

BROKER_TIMEOUT_S = 3.0


@dataclass(frozen=True)
class Check:
    """One line of the report. ``ok`` None is a remark that fails nothing."""

    name: str
    ok: bool | None
    detail: str


def run_doctor(config: Config) -> Iterator[Check]:
    """Yield each check as it is done; the slow ones (hashes, loading) come last."""
    yield Check("edge-llm", True, f"{__version__}, Python {platform.python_version()}, numpy {np.__version__}")
    yield Check("machine", True, f"{platform.machine()}, {physical_cores()} physical cores, {_memory()}")
    yield _guarded("providers", lambda: _providers(config))
    yield _int8(config)
    yield _guarded("broker", lambda: _broker(config))
    yield _prefix(config)
    try:
        bundle_folder = config.bundle or str(shipped_bundle())
    except BundleNotFoundError as error:
        yield Check("bundle", False, str(error))
        return
    yield _guarded("bundle", lambda: _bundle(bundle_folder))
    yield _guarded("answer", lambda: _answer(bundle_folder, config))


def format_check(check: Check) -> str:
    """One line for people."""
    mark = {True: "ok  ", False: "FAIL", None: "note"}[check.ok]
    return f"{mark}  {check.name:<10} {check.detail}"


def _guarded(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name, True, check())
    except (EdgeLlmError, OSError) as error:
        return Check(name, False, str(error))


def _memory() -> str:
    try:
        with open("/proc/meminfo", encoding="ascii") as stream:
            fields = dict(line.split(":", 1) for line in stream)
        return f"{int(fields['MemAvailable'].split()[0]) / 1e6:.1f} GB of memory available"
    except (OSError, KeyError, ValueError):
        return f"memory unknown on {sys.platform}"


def _providers(config: Config) -> str:
    choice = choose_provider(config.engine.providers)
    refused = "".join(f"; not {name}: {reason}" for name, reason in choice.refused.items())
    return f"{choice.name} of onnxruntime {ort.__version__}{refused}"


def _int8(config: Config) -> Check:
    dot_product = has_int8_dot_product()
    if dot_product is None:
        return Check("int8", None, "the system does not name the processor's features")
    if dot_product or not config.engine.target.endswith("int8"):
        return Check("int8", True, "the processor has int8 dot products" if dot_product else "not needed")
    return Check("int8", None, "no int8 dot products: a cpu-fp32 graph is likely faster here (engine.target)")


def _broker(config: Config) -> str:
    mqtt = config.mqtt
    with contextlib.closing(Asker(mqtt, user="doctor").connect(BROKER_TIMEOUT_S)) as asker:
        return f"{mqtt.host}:{mqtt.port} accepts us (MQTT {asker.protocol})"


def _prefix(config: Config) -> Check:
    """What a daemon has noticed about the prompts (cache/prefix_lint.py)."""
    try:
        finding = recent_finding(config, time.time())
    except EdgeLlmError as error:
        return Check("prefix", None, str(error))
    if finding is None:
        return Check("prefix", True, "no prompt varied near its head")
    return Check("prefix", None, f"{finding.user}: {finding}")


def _bundle(folder: str) -> str:
    bundle = Bundle.open(folder)
    bundle.verify()
    size_mb = sum(entry.size_bytes for entry in bundle.manifest.files) / 1e6
    targets = ", ".join(graph.target for graph in bundle.manifest.graphs)
    return (
        f"{bundle.manifest.name} {bundle.manifest.version} ({bundle.digest[:12]}), {size_mb:.0f} MB, "
        f"every hash matches; targets: {targets}"
    )


def _answer(folder: str, config: Config) -> str:
    model = load_model(Bundle.open(folder), config)
    how = "prepared copy" if model.prepared else "the bundle's own graph"
    return f"loaded in {model.load_s:.2f} s ({how}), and the first token is the expected one"
