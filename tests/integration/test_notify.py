"""What the daemon tells systemd, from the first line to the last, and that it falls silent when a thread hangs."""

from __future__ import annotations

import sys

import pytest

from tests.brokers import free_port, wait_for
from tests.integration.conftest import Daemon
from tests.paths import TINY_BUNDLE
from tests.systemd.manager import FakeManager

pytestmark = pytest.mark.broker
WAIT_S = 30
# A ping is due every 0.4 s, and an idle engine thread moves every second.
TIMEOUT_S = 1.2
PING_S = 1.0


class HangingDaemon(Daemon):
    """A daemon of which a thread can be held by the file ``hang_engine`` or ``hang_link`` in its folder."""

    def __init__(self, port, folder):
        super().__init__(TINY_BUNDLE, port, folder, "mqtt.keepalive_s=2")
        self._command[:3] = [sys.executable, "-m", "tests.integration.hanging_daemon"]


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path, monkeypatch):
    with FakeManager(tmp_path if request.param == "path" else None) as manager:
        monkeypatch.setenv("NOTIFY_SOCKET", manager.address)
        monkeypatch.setenv("WATCHDOG_USEC", str(int(TIMEOUT_S * 1e6)))
        monkeypatch.delenv("WATCHDOG_PID", raising=False)
        yield manager


@pytest.fixture
def daemon(mosquitto, manager, tmp_path, monkeypatch):
    # The broker comes first: it would tell the manager that it is ready, too.
    for name in ("hang_engine", "hang_link"):
        monkeypatch.setenv(name.upper(), str(tmp_path / name))
    daemon = HangingDaemon(mosquitto.port, tmp_path)
    daemon.start()
    yield daemon
    daemon.kill()


def test_ready_comes_after_loading_and_stopping_at_the_drain(daemon, manager, connect, mosquitto):
    heard = manager.until("READY=1")
    assert heard[0] == ["STATUS=loading tiny"]
    assert ["STATUS=preparing tiny"] in heard
    assert any(line.startswith("EXTEND_TIMEOUT_USEC=") for lines in heard for line in lines)
    assert not any("WATCHDOG=1" in lines for lines in heard)
    connect(mosquitto.port).ask("hello")
    manager.until("WATCHDOG=1")
    daemon.stop()
    assert manager.until("STOPPING=1")[-1] == ["STOPPING=1", "STATUS=draining"]


def test_ready_does_not_wait_for_the_broker(manager, start_daemon):
    port = free_port()
    start_daemon(port)
    [ready, status] = manager.until("READY=1")[-1]
    assert ready == "READY=1"
    assert status.startswith("STATUS=online; ")
    # The link's thread is well, it is only the broker that is not there.
    for _ in range(3):
        assert manager.hears("WATCHDOG=1", 10 * PING_S)


@pytest.mark.parametrize("thread", ["engine", "link"])
@pytest.mark.parametrize("manager", ["abstract"], indirect=True)
def test_a_hung_thread_ends_the_pings(daemon, manager, connect, mosquitto, tmp_path, thread):
    asker = connect(mosquitto.port)
    for _ in range(3):
        assert manager.hears("WATCHDOG=1", 10 * PING_S)
    hold = tmp_path / f"hang_{thread}"
    hold.touch()
    query = asker.send("hello")
    # Those that were due before the thread stood still.
    wait_for(lambda: not manager.hears("WATCHDOG=1", 2 * PING_S), 10 * PING_S)
    assert not manager.hears("WATCHDOG=1", 3 * PING_S)
    assert "no sign of life from" in daemon.log()
    hold.unlink()
    assert manager.hears("WATCHDOG=1", 10 * PING_S)
    assert list(asker.events(query, timeout_s=WAIT_S))[-1]["type"] == "final"


def test_a_daemon_that_cannot_start_is_never_ready(manager, start_daemon, tmp_path):
    daemon = start_daemon(free_port(), bundle=tmp_path / "none")
    assert daemon.process.wait(WAIT_S) == 2
    assert not manager.hears("READY=1", 0.01)
