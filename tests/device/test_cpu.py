from __future__ import annotations

import pytest

from edge_llm.device import cpu

X86 = """processor\t: 0
physical id\t: 0
core id\t\t: 0
flags\t\t: fpu avx2 avx512_vnni

processor\t: 1
physical id\t: 0
core id\t\t: 0
flags\t\t: fpu avx2 avx512_vnni
"""
PI4 = "processor\t: 0\nFeatures\t: fp asimd evtstrm crc32 cpuid\n"
ORIN = "processor\t: 0\nFeatures\t: fp asimd asimdhp asimddp\n"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    def fake(text: str, architecture: str, allowed: int) -> None:
        (tmp_path / "cpuinfo").write_text(text)
        monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
        monkeypatch.setattr(cpu.platform, "machine", lambda: architecture)
        monkeypatch.setattr(cpu.os, "sched_getaffinity", lambda _: set(range(allowed)))
        cpu.physical_cores.cache_clear()
        cpu.cpu_features.cache_clear()

    yield fake
    cpu.physical_cores.cache_clear()
    cpu.cpu_features.cache_clear()


def test_hyper_threads_count_once(machine):
    machine(X86, "x86_64", 2)
    assert cpu.physical_cores() == 1
    assert cpu.has_int8_dot_product() is True
    assert cpu.cpu_features() == "x86_64 avx2 avx512_vnni fpu"


@pytest.mark.parametrize(("text", "dot_product"), [(PI4, False), (ORIN, True)])
def test_arm_boards(machine, text, dot_product):
    machine(text, "aarch64", 4)
    assert cpu.physical_cores() == 4
    assert cpu.has_int8_dot_product() is dot_product


def test_a_cpuset_limits_the_threads(machine):
    machine(ORIN, "aarch64", 1)
    assert cpu.physical_cores() == 1


def test_no_cpuinfo_at_all(machine, monkeypatch, tmp_path):
    machine(ORIN, "riscv64", 3)
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "none")
    assert cpu.physical_cores() == 3
    assert cpu.has_int8_dot_product() is None
