"""A disk that is full, read-only, or whose folders are deleted while the daemon runs."""

from __future__ import annotations

import os
import resource
import shutil
import sys
import time

import pytest

from tests.brokers import wait_for
from tests.faults.conftest import WAIT_S

pytestmark = pytest.mark.broker
# Without these a process of root's may write where nobody may (capabilities(7)).
_DROP = (
    "import ctypes, os, sys; libc = ctypes.CDLL(None); [libc.prctl(24, number, 0, 0, 0) for number in (1, 2)]; "
    "os.execv(sys.argv[1], sys.argv[1:])"
)
WITHOUT_PRIVILEGE = (sys.executable, "-c", _DROP)


def kept(client) -> int:
    return client.metrics()["gauges"]["responses_kept"]


def restart(daemon, client) -> None:
    daemon.kill()
    since = time.monotonic()
    daemon.start()
    client.wait_status("online", since)


def test_a_disk_that_fills_up_costs_the_memory_of_the_past_and_comes_back(mosquitto, start_faulty, listen):
    daemon = start_faulty(mosquitto.port)
    client = listen(mosquitto.port)
    client.wait_status("online")
    client.answer("before", cache="use")
    wait_for(lambda: kept(client) == 1, WAIT_S)
    # No file may grow: EFBIG where a full disk says ENOSPC (setrlimit(2)).
    _, hard = resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (0, hard))
    for number in range(4):
        assert client.answer(f"full {number}", cache="use")["source"] == "model"
        assert client.answer("before", cache="use")["source"] == "response_cache"
    daemon.wait_log("could not write to the state file")
    resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (hard, hard))

    def written() -> bool:
        client.answer("after", cache="use")
        return kept(client) >= 2

    wait_for(written, WAIT_S)
    assert client.answer("after", cache="use")["source"] == "response_cache"
    assert daemon.warnings() == ["could not write to the state file"]


@pytest.mark.parametrize("prepare", [False, True])
def test_a_folder_that_may_not_be_written_costs_one_warning_each(mosquitto, start_faulty, listen, tmp_path, prepare):
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o500)
    settings = (f"engine.prepare={str(prepare).lower()}", 'serving.system_prompt="You are the voice of a car."')
    daemon = start_faulty(mosquitto.port, *settings, prefix=WITHOUT_PRIVILEGE)
    client = listen(mosquitto.port)
    client.wait_status("online")
    for source in ("model", "response_cache"):
        assert client.answer("what is kept", cache="use")["source"] == source
    daemon.wait_log("a snapshot is not saved")
    warnings = [warning.partition(":")[0] for warning in daemon.warnings()]
    expected = ["the state file cannot be used", "a snapshot is not saved"]
    assert sorted(warnings) == sorted(expected + ["no prepared copy, serving the bundle's own graph"] * prepare)
    assert list(cache.iterdir()) == []
    # It is tried again, without a further word, and used once the folder is good.
    cache.chmod(0o700)
    daemon.wait_log("the state file is used again")
    client.answer("what is kept", cache="use")
    wait_for(lambda: kept(client) == 1, WAIT_S)
    assert len(daemon.warnings()) == len(warnings)
    assert (cache / "state.sqlite3").stat().st_mode & 0o777 == 0o600


def test_folders_that_are_deleted_while_it_runs_are_made_again(mosquitto, start_faulty, listen, tmp_path):
    daemon = start_faulty(mosquitto.port, "engine.prepare=true")
    client = listen(mosquitto.port)
    client.wait_status("online")
    first = client.answer("what is kept", cache="use")
    wait_for(lambda: kept(client) == 1, WAIT_S)
    shutil.rmtree(tmp_path / "cache")
    daemon.wait_log("the state file was deleted or replaced")
    # What it held is forgotten, and everything is kept anew.
    again = client.answer("what is kept", cache="use")
    assert (again["source"], again["text"]) == ("model", first["text"])
    wait_for(lambda: kept(client) == 1, WAIT_S)
    restart(daemon, client)
    assert client.answer("what is kept", cache="use")["source"] == "response_cache"
    expected = ["prefixes", "prepared", *(f"state.sqlite3{end}" for end in ("", "-shm", "-wal", ".lock"))]
    wait_for(lambda: sorted(os.listdir(tmp_path / "cache")) == expected, WAIT_S)
    assert daemon.warnings() == ["the state file was deleted or replaced, and is opened anew"]
    assert "Traceback" not in daemon.log()
