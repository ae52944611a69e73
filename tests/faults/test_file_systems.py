"""File systems of their own under the daemon: really full, really read-only, or covered while it runs.

They are mounted in a namespace of the daemon's (unshare(1)), so nothing of the machine is touched.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.brokers import wait_for
from tests.faults.conftest import WAIT_S, FaultyDaemon

pytestmark = pytest.mark.broker
# Who is not root may mount in a namespace of users of its own, where the kernel allows it.
AS_ROOT = () if os.geteuid() == 0 else ("--user", "--map-root-user")
ENTER_AS_ROOT = () if os.geteuid() == 0 else ("--user", "--preserve-credentials")
# Beside the state file (its log of changes grows to 1 MB or so before it is reused).
SIZE = "size=4m"
UNUSABLE = "the state file cannot be used"


def with_mount(folder: Path, options: str, then: str = "true") -> tuple[str, ...]:
    """What to put before the daemon's command: it runs on a tmpfs at ``folder``; ``then`` is run first (shell)."""
    script = f'mount -t tmpfs -o {options} none "$0" && {{ {then}; }} && exec "$@"'
    return ("unshare", *AS_ROOT, "--mount", "sh", "-c", script, str(folder))


def mounted(daemon: FaultyDaemon, *command: str) -> None:
    """Run mount(8) or umount(8) where the daemon is."""
    enter = ("nsenter", "--target", str(daemon.pid), *ENTER_AS_ROOT, "--mount")
    subprocess.run([*enter, *command], check=True, capture_output=True, timeout=WAIT_S)


def seen_by(daemon: FaultyDaemon, path: Path) -> Path:
    return Path(f"/proc/{daemon.pid}/root") / path.relative_to("/")


def fill(file: Path) -> None:
    """Write until there is no byte left."""
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(4096))
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        file.with_name("one more").write_bytes(bytes(4096))


def kept(client) -> int:
    return client.metrics()["gauges"]["responses_kept"]


def is_kept_again(client) -> None:
    """Wait until what is asked now is answered from the file next time."""

    def again() -> bool:
        return client.answer("asked afterwards", cache="use")["source"] == "response_cache" and kept(client) >= 1

    wait_for(again, WAIT_S)


def warnings(daemon: FaultyDaemon) -> list[str]:
    return sorted(warning.partition(":")[0] for warning in daemon.warnings())


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """The folder of the daemon's state and copies."""
    folder = tmp_path / "cache"
    folder.mkdir()
    if shutil.which("unshare") is None or shutil.which("nsenter") is None:
        pytest.skip("needs unshare and nsenter (util-linux)")
    command = [*with_mount(folder, SIZE), "true"]
    allowed = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
    if allowed.returncode != 0:
        pytest.skip(f"mounting in a namespace is not allowed here: {allowed.stderr.strip()}")
    return folder


def test_a_disk_that_is_full_costs_one_warning_until_it_has_room(mosquitto, start_faulty, listen, cache):
    daemon = start_faulty(mosquitto.port, prefix=with_mount(cache, SIZE))
    client = listen(mosquitto.port)
    client.wait_status("online")
    client.answer("before", cache="use")
    wait_for(lambda: kept(client) == 1, WAIT_S)
    filler = seen_by(daemon, cache) / "filler"
    fill(filler)
    for number in range(4):
        assert client.answer(f"full {number}", cache="use")["source"] == "model"
        assert client.answer("before", cache="use")["source"] == "response_cache"
    daemon.wait_log("could not write to the state file")
    filler.unlink()
    is_kept_again(client)
    assert warnings(daemon) == ["could not write to the state file"]


@pytest.mark.parametrize("state", ["full", "read-only"])
def test_a_disk_that_takes_nothing_at_the_start_is_used_once_it_does(mosquitto, start_faulty, listen, cache, state):
    settings = ("engine.prepare=true", 'serving.system_prompt="You are the voice of a car."')
    prefix = {
        # dd ends with an error, and has filled it.
        "full": with_mount(cache, SIZE, f"dd if=/dev/zero of={cache}/filler bs=4k 2>/dev/null || true"),
        "read-only": with_mount(cache, f"{SIZE},ro"),
    }[state]
    daemon = start_faulty(mosquitto.port, *settings, prefix=prefix)
    client = listen(mosquitto.port)
    client.wait_status("online")
    for source in ("model", "response_cache"):
        assert client.answer("what is kept", cache="use")["source"] == source
    daemon.wait_log("a snapshot is not saved")
    expected = [UNUSABLE, "a snapshot is not saved", "no prepared copy, serving the bundle's own graph"]
    assert warnings(daemon) == sorted(expected)
    if state == "full":
        (seen_by(daemon, cache) / "filler").unlink()
    else:
        mounted(daemon, "mount", "-o", "remount,rw", str(cache))
    daemon.wait_log("the state file is used again")
    is_kept_again(client)
    assert warnings(daemon) == sorted(expected)


def test_a_disk_that_vanishes_while_it_runs_is_used_again_when_it_is_back(mosquitto, start_faulty, listen, cache):
    daemon = start_faulty(mosquitto.port, prefix=with_mount(cache, SIZE))
    client = listen(mosquitto.port)
    client.wait_status("online")
    client.answer("before", cache="use")
    wait_for(lambda: kept(client) == 1, WAIT_S)
    # As when a card is pulled out: the path leads to something else, which takes nothing.
    mounted(daemon, "mount", "-t", "tmpfs", "-o", "ro", "none", str(cache))
    daemon.wait_log(UNUSABLE)
    for source in ("model", "response_cache"):
        assert client.answer("before", cache="use")["source"] == source
    # Lazily: the daemon holds the folder that it finds there, to notice when it goes.
    mounted(daemon, "umount", "--lazy", str(cache))
    daemon.wait_log("the state file is used again")
    assert client.answer("before", cache="use")["source"] == "response_cache"
    is_kept_again(client)
    assert warnings(daemon) == [UNUSABLE]
