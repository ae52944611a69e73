"""``edge-llm doctor``: is this machine, this bundle and this broker fit to serve? One line each."""

from __future__ import annotations

import contextlib
import platform
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import onnxruntime as ort

from edge_llm import __version__
from edge_llm.bundle.manifest import Bundle
from edge_llm.bundle.prepare import BUILD_TIMEOUT_S
from edge_llm.bundle.shipped import bundle_folder
from edge_llm.bundle.tensorrt_engines import PROGRESS_S
from edge_llm.cache_command import recent_finding
from edge_llm.config import load_config
from edge_llm.device.board import detect_board
from edge_llm.device.cpu import has_int8_dot_product, physical_cores
from edge_llm.device.energy import find_meter
from edge_llm.device.memory import available_memory
from edge_llm.device.power import nvpmodel_mode, nvpmodel_modes, read_power
from edge_llm.device.profile import device_layer, device_names
from edge_llm.device.session import CPU
from edge_llm.engine.loading import load_model
from edge_llm.errors import BundleNotFoundError, EdgeLlmError, ProviderError
from edge_llm.mqtt.asking import Asker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from edge_llm.config import Config

BROKER_TIMEOUT_S: Final = 3.0
_NAME_WIDTH: Final = 16
_PROGRESS_LINE_S: Final = 30.0


@dataclass(frozen=True)
class Check:
    """One line of the report. ``ok`` None is a remark that fails nothing."""

    name: str
    ok: bool | None
    detail: str


def run_doctor(config: Config, *, build: bool = True) -> Iterator[Check]:
    """Yield each check as it is done; the slow ones (hashes, loading) come last.

    Args:
        config: the settings.
        build: whether TensorRT engines that are missing are built, which is said on stderr before it begins.
    """
    yield Check("edge-llm", True, f"{__version__}, Python {platform.python_version()}, numpy {np.__version__}")
    yield Check("machine", True, f"{platform.machine()}, {physical_cores()} physical cores, {_memory()}")
    yield _board(config)
    yield _power(config)
    yield _providers(config)
    yield _int8(config)
    yield _guarded("broker", lambda: _broker(config))
    yield _prefix(config)
    try:
        folder = str(bundle_folder(config))
    except BundleNotFoundError as error:
        yield Check("bundle", False, str(error))
        return
    yield _guarded("bundle", lambda: _bundle(folder, config))
    yield _guarded("answer", lambda: _answer(folder, config, build=build))


def check_device_files() -> Iterator[Check]:
    """One line for each device file."""
    for name in device_names():
        yield _guarded(name, lambda name=name: _device_file(name))  # type: ignore[misc]


def format_check(check: Check) -> str:
    """One line for people."""
    mark = {True: "ok  ", False: "FAIL", None: "note"}[check.ok]
    return f"{mark}  {check.name:<{_NAME_WIDTH}} {check.detail}"


def _guarded(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name, True, check())
    except (EdgeLlmError, OSError) as error:
        return Check(name, False, str(error))


def _memory() -> str:
    available = available_memory()
    if available is None:
        return f"memory unknown on {sys.platform}"
    return f"{available.nbytes / 1e9:.1f} GB of memory left ({available.source})"


def _power(config: Config) -> Check:
    """Heat, supply and power mode."""
    power = read_power()
    details = ["no temperature sensor" if power.temperature_c is None else f"{power.temperature_c:.0f} degrees"]
    if power.on_battery is not None:
        details.append("on battery" if power.on_battery else "on mains")
    if power.throttled:
        details.append("the processor is being slowed down")
    meter = find_meter()
    details.append("nothing measures the draw" if meter is None else f"{meter.name} measures the draw")
    mode, wanted = nvpmodel_mode(), config.power.nvpmodel
    if mode is not None:
        details.append(f"power mode {mode}")
    if wanted is not None and mode is not None and mode != wanted:
        details.append(_other_mode(wanted, nvpmodel_modes()))
        return Check("power", None, ", ".join(details))
    return Check("power", None if power.throttled else True, ", ".join(details))


def _other_mode(wanted: str, modes: dict[int, str]) -> str:
    """What to do where the device file is meant for another power mode, which a smaller module may not have."""
    if modes and wanted not in modes.values():
        there = ", ".join(modes.values())
        return f"{wanted}, which the device file is meant for, is none of this board's: {there} (set power.nvpmodel)"
    number = "".join(f" {number}" for number, name in modes.items() if name == wanted)
    return f"the device file is meant for {wanted} (sudo nvpmodel -m{number}, or set power.nvpmodel)"


def _device_file(name: str) -> str:
    config = load_config(device_layer=device_layer(name))
    cache_mib = config.cache.max_bytes >> 20
    return f"{', '.join(config.engine.providers)}; slots {config.engine.slots}, prefix cache {cache_mib} MiB"


def _board(config: Config) -> Check:
    """The device file in use, and how it was found."""
    board = detect_board()
    chosen = f"device file {config.device}, which was named" if config.device != board.device else board.device
    named = f"{board.model or 'unnamed'}: {chosen}"
    return Check("board", None if board.remark else True, f"{named}; {board.remark}" if board.remark else named)


def _providers(config: Config) -> Check:
    """What onnxruntime has of the providers that are wanted; whether one really serves shows in ``answer``."""
    available = ort.get_available_providers()
    missing = [name for name in config.engine.providers if name not in available]
    there = [name for name in config.engine.providers if name in available]
    detail = f"onnxruntime {ort.__version__} has {', '.join(there) or 'none of those in engine.providers'}"
    if missing:
        detail += f", and was built without {', '.join(missing)}"
    if not there:
        return Check("providers", False, f"{detail}; it has: {', '.join(available)}")
    return Check("providers", None if missing else True, detail)


def _int8(config: Config) -> Check:
    dot_product = has_int8_dot_product()
    if dot_product is None:
        return Check("int8", None, "the system does not name the processor's features")
    if dot_product:
        return Check("int8", True, "the processor has int8 dot products")
    wanted = (config.engine.target,) if config.engine.target else config.engine.targets.get(CPU, ())
    if wanted and not wanted[0].endswith("int8"):
        return Check("int8", True, f"not needed by {wanted[0]}")
    return Check(
        "int8", None, "no int8 dot products: a cpu-fp32 graph is likely faster here (python -m export bundle --target)"
    )


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


def _bundle(folder: str, config: Config) -> str:
    bundle = Bundle.open(folder, config.bundle_keys)
    bundle.verify()
    size_mb = sum(entry.size_bytes for entry in bundle.manifest.files) / 1e6
    targets = ", ".join(graph.target for graph in bundle.manifest.graphs)
    return (
        f"{bundle.manifest.name} {bundle.manifest.version} ({bundle.digest[:12]}), {size_mb:.0f} MB, "
        f"every hash matches{', signed by a trusted key' if config.bundle_keys else ''}; targets: {targets}"
    )


def _answer(folder: str, config: Config, *, build: bool) -> str:
    model = load_model(Bundle.open(folder, config.bundle_keys), config, _tell_build if build else _refuse_build)
    how = "prepared copy" if model.prepared else "the bundle's own graph"
    refused = "".join(f"; not {name}: {reason}" for name, reason in model.provider.refused.items())
    return (
        f"{model.provider.target} on {model.provider.name}, loaded in {model.load_s:.2f} s ({how}), and the first "
        f"token is the expected one{refused}"
    )


def _tell_build(_state: str, *, elapsed_s: float | None = None, engines: int = 0, graphs: int = 0, **_: object) -> None:
    """Nothing else of what ``load_model`` does takes minutes."""
    if elapsed_s == 0:
        print(
            f"building TensorRT engines of {graphs} graph{'s' * (graphs > 1)}, which the next start finds: this takes "
            f"minutes (how many was not measured on hardware; after {BUILD_TIMEOUT_S * graphs // 60} it is given up). "
            "To skip it: Ctrl-C, and --no-build",
            file=sys.stderr,
            flush=True,
        )
    elif elapsed_s is not None and elapsed_s % _PROGRESS_LINE_S < PROGRESS_S:
        print(f"  {elapsed_s:.0f} s, {engines} of {graphs} engines", file=sys.stderr, flush=True)


def _refuse_build(_state: str, *, elapsed_s: float | None = None, **_: object) -> None:
    if elapsed_s is not None:
        raise ProviderError("its engines are not built yet, and --no-build leaves that to the first start")
