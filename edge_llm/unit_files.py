"""The systemd unit of this package, and the drop-in that fits it to one machine: the command, memory, processors."""

from __future__ import annotations

import ipaddress
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from edge_llm.device.providers import Candidate, candidates
from edge_llm.device.session import CPU, CPU_PROVIDER
from edge_llm.engine.loading import memory_needs
from edge_llm.errors import ConfigError, ManifestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edge_llm.bundle.manifest import Bundle
    from edge_llm.config import Config

UNIT: Final = "edge-llm.service"
GPU_DROP_IN: Final = "edge-llm-gpu.conf"
# DynamicUser= takes a user of the unit's name if there is one: only then can a folder be his before the service starts.
SERVICE_USER: Final = "edge-llm"
# StateDirectory=, CacheDirectory= and RuntimeDirectory=, and where these are links to.
_OWN_FOLDERS: Final = tuple(
    f"/{kind}/{name}edge-llm" for kind in ("var/lib", "var/cache", "run") for name in ("", "private/")
)
# In the wheel they lie inside the package; in a checkout, beside it.
_FOLDERS: Final = (Path(__file__).parent / "systemd", Path(__file__).parent.parent / "systemd")
# The control group is charged for the pages of every library and file that it was the first to read, too.
_SLACK: Final = 1.25
_SHARED_BYTES: Final = 256 << 20
# The CUDA libraries and a context, in the machine's own memory.
_CUDA_BYTES: Final = 1 << 30
# Packing holds the weights twice, in a process of its own beside the daemon.
_PREPARE_COPIES: Final = 2
# What a stop takes after drain_timeout_s: the last acknowledgements, and the caches.
_CLOSE_S: Final = 15
# Not on every machine, and a unit that names a missing one does not start.
_GPU_GROUP: Final = "render"
_LOOPBACK_NAMES: Final = frozenset({"localhost", "localhost.localdomain"})


@dataclass(frozen=True)
class Machine:
    """What the drop-in says about one machine.

    Attributes:
        command: how the daemon is started, without arguments of a shell.
        config: its settings, from the device file and the config file.
        bundle: what it serves.
        groups: the machine's groups, some of which may use a GPU.
    """

    command: Sequence[str]
    config: Config
    bundle: Bundle
    groups: frozenset[str] = frozenset()


def unit_text(name: str) -> str:
    """A unit or drop-in as it was shipped. Raises ``ConfigError`` if it is missing."""
    for folder in _FOLDERS:
        if (folder / name).is_file():
            return (folder / name).read_text(encoding="utf-8")
    raise ConfigError(f"{name} is missing from {_FOLDERS[0]}: install edge-llm again")


def uses_gpu(config: Config) -> bool:
    """Whether a provider is wanted that runs elsewhere than on the processor."""
    return any(name != CPU for name in config.engine.providers)


def drop_in_text(machine: Machine) -> str:
    """The drop-in of one machine."""
    config, manifest = machine.config, machine.bundle.manifest
    # A comment must stay one, whoever named the bundle: what systemd reads here it runs as root.
    served = "".join(c for c in f"{config.device} and the bundle {manifest.name} {manifest.version}" if c.isprintable())
    lines = [
        f"# For {served}. `edge-llm install` writes it anew;",
        "# put changes of your own into another drop-in: systemctl edit edge-llm",
        "[Service]",
        "ExecStart=",
        f"ExecStart={' '.join(map(quoted, machine.command))}",
        f"TimeoutStopSec={math.ceil(config.serving.drain_timeout_s) + _CLOSE_S}s",
        "",
        *_memory_lines(machine),
        "",
        *_cpu_lines(config),
    ]
    if folders := folders_elsewhere(config):
        lines += [
            "",
            f"# {', '.join(folders)}; the user {SERVICE_USER} must own them.",
            *map(_read_write, folders.values()),
        ]
    if uses_gpu(config) and _GPU_GROUP in machine.groups:
        lines += ["", "# Beside those of 20-gpu.conf.", f"SupplementaryGroups={_GPU_GROUP}"]
    if is_loopback(config.mqtt.host):
        lines += ["", "# The broker is on this machine: nothing else is reached.", "IPAddressDeny=any"]
        lines += ["IPAddressAllow=localhost"]
    return "\n".join(lines) + "\n"


def folders_elsewhere(config: Config) -> dict[str, str]:
    """Folders that the daemon writes and systemd does not make for it, by the setting that names them."""
    named = {"cache_dir": config.cache_dir, "state_dir": config.state_dir, "bundle_store": config.bundle_store}
    # Two leading slashes, which normpath keeps, mean one here.
    folders = {
        setting: re.sub("^//", "/", os.path.normpath(folder)) for setting, folder in named.items() if folder is not None
    }
    return {
        setting: folder
        for setting, folder in folders.items()
        if not any(folder == own or folder.startswith(f"{own}/") for own in _OWN_FOLDERS)
    }


def memory_limit_bytes(bundle: Bundle, config: Config) -> int:
    """The most memory that the service may have: what it takes when all is full, or while it prepares, and more."""
    _, needs = _largest_needs(bundle, config)
    preparing = _PREPARE_COPIES * (needs["weights"] + needs["program"])
    largest = max(sum(needs.values()), preparing)
    return int(largest * _SLACK) + _SHARED_BYTES + (_CUDA_BYTES if uses_gpu(config) else 0)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine for certain, without asking a name server."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() in _LOOPBACK_NAMES


def quoted(argument: str) -> str:
    """An argument as ExecStart= wants it (systemd.service(5), "Command lines")."""
    escaped = argument.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return escaped if argument and not set(argument) & set(" \t'\"\\;") else f'"{escaped}"'


def _read_write(folder: str) -> str:
    # Nothing that systemd would read as more than a path (systemd.syntax(7)), and not all there is.
    if not re.fullmatch(r"(/[\w.@+,=-]+)+", folder, re.ASCII):
        raise ConfigError(f"{folder}: a folder of the service may have letters, digits and ._@+,=- in its name")
    # With the dash, the daemon starts without it, too, as when its disk is not mounted.
    return f"ReadWritePaths=-{folder}"


def _largest_needs(bundle: Bundle, config: Config) -> tuple[str, dict[str, int]]:
    """What takes the most of all that ``serve`` may try, and its needs: a provider that fails gives way to the next.

    An image may be for another machine, and onnxruntime-gpu may be installed later: each provider counts as there.
    """
    engine, manifest = config.engine, bundle.manifest
    try:
        tried = list(candidates(engine, manifest, {}, available=engine.providers))
    except ManifestError:
        tried = []
    # If they can choose none, the daemon will say so.
    chosen = tried or [Candidate(CPU_PROVIDER, graph) for graph in manifest.graphs]
    needs = {str(one): memory_needs(bundle, config, one.graph, one.provider.name) for one in chosen}
    return max(needs.items(), key=lambda item: sum(item[1].values()))


def _memory_lines(machine: Machine) -> list[str]:
    largest, needs = _largest_needs(machine.bundle, machine.config)
    terms = " + ".join(f"{name} {nbytes / 1e6:.0f}" for name, nbytes in needs.items())
    limit = math.ceil(memory_limit_bytes(machine.bundle, machine.config) / (1 << 20))
    return [
        f"# {largest}: {terms} MB; a quarter more, and what is shared or needed to prepare.",
        f"MemoryMax={limit}M",
    ]


def _cpu_lines(config: Config) -> list[str]:
    engine = config.engine
    if engine.affinity:
        return ["# engine.affinity", f"AllowedCPUs={' '.join(map(str, sorted(set(engine.affinity))))}"]
    if engine.threads:
        # One more for the network and for what is around the graph.
        return [f"# engine.threads = {engine.threads}, and one more", f"CPUQuota={100 * (engine.threads + 1)}%"]
    return ["# engine.threads = 0: every core may be used. CPUQuota= or engine.affinity would set a limit."]
