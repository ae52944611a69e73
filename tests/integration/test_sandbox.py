"""The daemon under the unit's own system call filter: a library that comes to need more shows here first."""

from __future__ import annotations

import ctypes
import ctypes.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edge_llm.unit_files import UNIT, unit_text
from tests.integration.conftest import Daemon
from tests.paths import TINY_BUNDLE
from tests.systemd import sandboxed

PR_GET_MDWE = 66
pytestmark = [
    pytest.mark.broker,
    pytest.mark.skipif(
        shutil.which("systemd-analyze") is None or ctypes.util.find_library("seccomp") is None,
        reason="systemd-analyze or libseccomp is missing: apt-get install systemd",
    ),
    pytest.mark.skipif(ctypes.CDLL(None).prctl(PR_GET_MDWE, 0, 0, 0, 0) < 0, reason="needs Linux 6.3"),
]


def group(name: str) -> set[str]:
    """The system calls of one of systemd's groups."""
    listed = subprocess.run(
        ["systemd-analyze", "syscall-filter", "--no-pager", name], capture_output=True, text=True, check=True
    ).stdout
    names = [line.strip() for line in listed.splitlines()[1:] if line.startswith(" ") and "#" not in line]
    return set().union(*(group(one) if one.startswith("@") else {one} for one in names))


def allowed_calls() -> set[str]:
    """What the SystemCallFilter= lines of the unit come to."""
    allowed: set[str] = set()
    for line in unit_text(UNIT).splitlines():
        key, _, value = line.partition("=")
        if key == "SystemCallFilter":
            names = value.removeprefix("~").split()
            calls = set().union(*(group(name) if name.startswith("@") else {name} for name in names))
            allowed = allowed - calls if value.startswith("~") else allowed | calls
    return allowed


def test_the_daemon_needs_no_more_than_the_unit_allows(mosquitto, connect, tmp_path):
    calls = allowed_calls()
    assert {"read", "sched_setaffinity"} <= calls
    assert not {"mount", "ptrace", "setuid", "reboot", "bpf"} & calls
    (tmp_path / "calls").write_text("\n".join(sorted(calls)))
    daemon = Daemon(TINY_BUNDLE, mosquitto.port, tmp_path, "engine.affinity=[0]", "feedback.enabled=true")
    daemon._command[:0] = [sys.executable, str(Path(sandboxed.__file__)), str(tmp_path / "calls")]
    daemon.start()
    try:
        asker = connect(mosquitto.port)
        assert asker.ask("hello")["usage"]["completion_tokens"] > 0
        status = Path(f"/proc/{daemon.process.pid}/status").read_text()
        assert "Seccomp:\t2" in status
        assert daemon.stop() == 0
    finally:
        daemon.kill()
    # The first start prepares a copy in a child process.
    assert '"prepared":true' in daemon.log()
    assert '"level":"error"' not in daemon.log()
