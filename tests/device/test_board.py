from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_llm.device.board import detect_board
from tests.device.boards import DEVICE_TREES, device_tree, pc


@pytest.mark.parametrize(
    ("board", "device"),
    [
        ("orin-nano", "jetson-orin-nano"),
        ("orin-nano-4gb", "jetson-orin-nano"),
        ("orin-nx", "jetson-orin-nx"),
        ("orin-nx-8gb", "jetson-orin-nx"),
        ("agx-orin", "jetson-agx-orin"),
        ("agx-as-nano", "jetson-orin-nano"),
        ("thor", "jetson-thor"),
        ("pi-5", "raspberry-pi-5"),
        ("cm-4", "raspberry-pi-4"),
    ],
)
def test_a_board_is_known_by_its_module(tmp_path, board, device):
    found = detect_board(device_tree(tmp_path, board), "aarch64")
    assert (found.device, found.model, found.remark) == (device, DEVICE_TREES[board][1], "")


@pytest.mark.parametrize(
    ("board", "device", "remark"),
    [
        ("orin-unknown", "jetson-orin-nano", "an unknown module with nvidia,tegra234"),
        ("xavier", "default", "a Jetson before Orin"),
        ("rock", "default", "an unknown board"),
    ],
)
def test_what_is_not_known_is_said(tmp_path, board, device, remark):
    found = detect_board(device_tree(tmp_path, board), "aarch64")
    assert found.device == device
    assert remark in found.remark


@pytest.mark.parametrize(
    ("vendor", "product", "flags", "device", "remark"),
    [
        ("Advantech", "UNO-2484G", "fpu avx2 fma", "x86-64", ""),
        ("QEMU", "Standard PC (Q35 + ICH9, 2009)", "fpu avx2", "x86-64", "a virtual machine"),
        ("PC Engines", "apu2", "fpu sse4_2", "default", "an x86-64 processor without AVX2: it will be slow"),
    ],
)
def test_pcs(tmp_path, vendor, product, flags, device, remark):
    found = detect_board(pc(tmp_path, vendor, product, flags), "x86_64")
    assert (found.device, found.model, found.remark) == (device, f"{vendor} {product}", remark)


def test_nothing_at_all_is_the_default(tmp_path):
    found = detect_board(tmp_path, "riscv64")
    assert (found.device, found.model) == ("default", "")
    assert "riscv64" in found.remark


def test_this_machine_has_a_device_file():
    from edge_llm.device.profile import device_names

    assert detect_board().device in device_names()


@given(st.binary(max_size=64), st.binary(max_size=32))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_nothing_that_a_kernel_says_raises(tmp_path, compatible, model):
    folder = tmp_path / "proc/device-tree"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compatible").write_bytes(compatible)
    (folder / "model").write_bytes(model)
    detect_board(tmp_path, "aarch64")
