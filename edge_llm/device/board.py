"""Which board this is, so that its device file is taken without being asked for.

ARM boards name themselves in the device tree (``/proc/device-tree``), PCs in DMI (``/sys/class/dmi/id``). A Jetson's
``compatible`` holds the carrier and the module, and the module is what counts: NVIDIA's part numbers are in the device
trees of its Linux sources (``tegra234-p3768-0000+p3767-0005.dts`` and so on).
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edge_llm.device.cpu import cpu_flags
from edge_llm.device.sysfs import read_line, read_text

DEFAULT_DEVICE: Final = "default"
X86_DEVICE: Final = "x86-64"

# Module part number, or its beginning, and the device file.
_JETSON_MODULES: Final = (
    ("3767-0000", "jetson-orin-nx"),
    ("3767-0001", "jetson-orin-nx"),
    ("3767-", "jetson-orin-nano"),
    ("3701-", "jetson-agx-orin"),
    ("3834-", "jetson-thor"),
)
# An emulated module stands behind "-as-"; a part number that stands before it is the one that does the emulating.
_PART_NUMBER: Final = re.compile(r"p(\d{4}-\d{4})(?!-as-)\b")
# Where the module is not named: the smallest board of the family fits on all of them.
_JETSON_CHIPS: Final = {"nvidia,tegra234": "jetson-orin-nano", "nvidia,tegra264": "jetson-thor"}
_OLD_JETSON_CHIPS: Final = frozenset({"nvidia,tegra124", "nvidia,tegra210", "nvidia,tegra186", "nvidia,tegra194"})
_RASPBERRY_CHIPS: Final = {"brcm,bcm2712": "raspberry-pi-5", "brcm,bcm2711": "raspberry-pi-4"}
_VIRTUAL: Final = re.compile(r"qemu|kvm|virtual|vmware|bochs|xen", re.IGNORECASE)


@dataclass(frozen=True)
class Board:
    """A board and its device file.

    Attributes:
        device: the device file's name.
        model: what the board calls itself; empty where it says nothing.
        remark: what a user should know about the choice; empty if it was plain.
    """

    device: str
    model: str
    remark: str = ""


def detect_board(root: Path = Path("/"), machine: str | None = None) -> Board:
    """Recognise the board. Never raises: an unknown one gets the default file, with a remark.

    Args:
        root: the folder that holds ``proc`` and ``sys``.
        machine: as ``platform.machine()``, which is the default.
    """
    tree = root / "proc/device-tree"
    compatible = [name for name in (read_text(tree / "compatible") or "").split("\0") if name]
    model = (read_text(tree / "model") or "").strip("\0 \n")
    if compatible:
        return _from_device_tree(compatible, model or compatible[0])
    machine = machine or platform.machine()
    if machine in ("x86_64", "AMD64"):
        return _x86(root)
    return Board(DEFAULT_DEVICE, model, f"an unknown {machine} machine without a device tree")


def _from_device_tree(compatible: list[str], model: str) -> Board:
    parts = [part for name in compatible if name.startswith("nvidia,") for part in _PART_NUMBER.findall(name)]
    # The module comes behind the carrier.
    for part in reversed(parts):
        for beginning, device in _JETSON_MODULES:
            if part.startswith(beginning):
                return Board(device, model)
    for name in compatible:
        if name in _JETSON_CHIPS:
            device = _JETSON_CHIPS[name]
            return Board(device, model, f"an unknown module with {name}: taken for the smallest one")
        if name in _OLD_JETSON_CHIPS:
            return Board(DEFAULT_DEVICE, model, "a Jetson before Orin: its JetPack is too old for the GPU")
        if name in _RASPBERRY_CHIPS:
            return Board(_RASPBERRY_CHIPS[name], model)
    return Board(DEFAULT_DEVICE, model, "an unknown board")


def _x86(root: Path) -> Board:
    names = [read_line(root / "sys/class/dmi/id" / part) or "" for part in ("sys_vendor", "product_name")]
    model = " ".join(filter(None, names))
    flags = cpu_flags(root / "proc/cpuinfo")
    if "avx2" not in flags:
        return Board(DEFAULT_DEVICE, model, "an x86-64 processor without AVX2: it will be slow" if flags else "")
    return Board(X86_DEVICE, model, "a virtual machine" if _VIRTUAL.search(model) else "")
