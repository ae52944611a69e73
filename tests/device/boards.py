"""Fake /proc and /sys trees of real boards, as their kernels show them."""

from __future__ import annotations

from pathlib import Path
from typing import Final

# compatible, model
DEVICE_TREES: Final = {
    "orin-nano": (
        ["nvidia,p3768-0000+p3767-0005-super", "nvidia,p3767-0005", "nvidia,tegra234"],
        "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
    ),
    "orin-nano-4gb": (["nvidia,p3768-0000+p3767-0004", "nvidia,p3767-0004", "nvidia,tegra234"], "Orin Nano 4GB"),
    "orin-nx": (
        ["nvidia,p3768-0000+p3767-0000", "nvidia,p3767-0000", "nvidia,tegra234"],
        "NVIDIA Jetson Orin NX Engineering Reference Developer Kit",
    ),
    "orin-nx-8gb": (["acme,carrier", "nvidia,p3509-0000+p3767-0001", "nvidia,tegra234"], "Acme box"),
    "agx-orin": (
        ["nvidia,p3737-0000+p3701-0005", "nvidia,p3701-0005", "nvidia,tegra234"],
        "NVIDIA Jetson AGX Orin Developer Kit",
    ),
    "agx-as-nano": (["nvidia,p3737-0000+p3701-0000-as-p3767-0004", "nvidia,tegra234"], "Jetson AGX Orin as Nano 4GB"),
    "thor": (
        ["nvidia,p4071-0000+p3834-0008", "nvidia,p3834-0008", "nvidia,tegra264"],
        "NVIDIA Jetson AGX Thor Developer Kit",
    ),
    "orin-unknown": (["acme,board", "nvidia,tegra234"], "Acme Edge 1"),
    "xavier": (["nvidia,p3668-0001", "nvidia,tegra194"], "NVIDIA Jetson Xavier NX Developer Kit"),
    "pi-5": (["raspberrypi,5-model-b", "brcm,bcm2712"], "Raspberry Pi 5 Model B Rev 1.0"),
    "cm-4": (["raspberrypi,4-compute-module", "brcm,bcm2711"], "Raspberry Pi Compute Module 4 Rev 1.1"),
    "rock": (["radxa,rock-5b", "rockchip,rk3588"], "Radxa ROCK 5B"),
}


def device_tree(root: Path, name: str) -> Path:
    """Write a board's device tree under ``root``; returns ``root``."""
    compatible, model = DEVICE_TREES[name]
    folder = root / "proc/device-tree"
    folder.mkdir(parents=True)
    # Device tree strings end in NUL.
    (folder / "compatible").write_bytes("".join(f"{entry}\0" for entry in compatible).encode())
    (folder / "model").write_bytes(f"{model}\0".encode())
    return root


def pc(root: Path, vendor: str, product: str, flags: str) -> Path:
    """Write a PC's DMI and cpuinfo under ``root``; returns ``root``."""
    folder = root / "sys/class/dmi/id"
    folder.mkdir(parents=True)
    (folder / "sys_vendor").write_text(f"{vendor}\n")
    (folder / "product_name").write_text(f"{product}\n")
    (root / "proc").mkdir()
    (root / "proc/cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    return root
