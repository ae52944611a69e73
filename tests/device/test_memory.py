from __future__ import annotations

from pathlib import Path

import pytest

from edge_llm.device.memory import available_memory, check_memory
from edge_llm.errors import MemoryPlanError


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 8000000 kB\nMemFree: 100 kB\nMemAvailable:   2000000 kB\nSwapTotal: 9 kB\n"}
SERVICE = "sys/fs/cgroup/system.slice/edge-llm.service"
STAT = "anon 40000000\nfile 60000000\ninactive_file 50000000\nactive_file 10000000\n"
V2 = {
    "proc/self/cgroup": "0::/system.slice/edge-llm.service\n",
    "sys/fs/cgroup/system.slice/edge-llm.service/memory.max": "700000000\n",
    "sys/fs/cgroup/system.slice/edge-llm.service/memory.current": "100000000\n",
    "sys/fs/cgroup/system.slice/memory.max": "max\n",
    "sys/fs/cgroup/system.slice/memory.current": "5\n",
}
V1 = {
    "proc/self/cgroup": "12:cpu,cpuacct:/x\n4:memory:/docker/abc\n",
    "sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": "500000000\n",
    "sys/fs/cgroup/memory/docker/abc/memory.usage_in_bytes": "50000000\n",
}


@pytest.mark.parametrize(
    ("files", "nbytes", "source"),
    [
        (MEMINFO, 2_048_000_000, "MemAvailable"),
        ({**MEMINFO, **V2}, 600_000_000, "the limit of control group edge-llm.service"),
        ({**MEMINFO, **V1}, 450_000_000, "the limit of control group abc"),
        (V2, 600_000_000, "the limit of control group edge-llm.service"),
        ({**V2, f"{SERVICE}/memory.stat": STAT}, 650_000_000, "the limit of control group edge-llm.service"),
        ({**V2, f"{SERVICE}/memory.stat": "garbage"}, 600_000_000, "the limit of control group edge-llm.service"),
        ({**V2, "sys/fs/cgroup/system.slice/memory.max": "80"}, 75, "the limit of control group system.slice"),
    ],
)
def test_the_tightest_bound_counts(tmp_path, files, nbytes, source):
    assert available_memory(write(tmp_path, files)) == (nbytes, source)


@pytest.mark.parametrize(
    "files", [{}, {"proc/meminfo": "MemTotal: 1 kB\n", "proc/self/cgroup": "0::/../../x\ngarbage\n"}]
)
def test_where_nothing_is_told_nothing_is_refused(tmp_path, files):
    assert available_memory(write(tmp_path, files)) is None
    check_memory({"weights": 1 << 50}, tmp_path)


def test_what_does_not_fit_is_refused_with_the_sum(tmp_path):
    write(tmp_path, MEMINFO)
    check_memory({"weights": 2_000_000_000, "slots": 48_000_000}, tmp_path)
    with pytest.raises(MemoryPlanError) as raised:
        check_memory({"weights": 2_000_000_000, "4 slots of 1024 tokens": 300_000_000}, tmp_path)
    assert str(raised.value).startswith(
        "this needs 2300 MB of memory (weights 2000 + 4 slots of 1024 tokens 300), and 2048 MB are left (MemAvailable)"
    )


def test_this_machine_can_be_asked():
    found = available_memory()
    assert found is None or found.nbytes > 0
