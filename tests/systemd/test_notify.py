"""What is said to systemd, and when."""

from __future__ import annotations

import logging
import os

import pytest

from edge_llm.notify import Heartbeat, Notifier, Watchdog, watchdog_timeout_s
from tests.systemd.manager import FakeManager


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path):
    with FakeManager(tmp_path if request.param == "path" else None) as manager:
        yield manager


def test_every_message_arrives_as_its_lines(manager):
    notifier = Notifier.from_environ({"NOTIFY_SOCKET": manager.address})
    notifier.status("loading\ntiny")
    notifier.extend_start(1.5)
    notifier.ready("online")
    notifier.status("online")  # as it was: not sent
    notifier.alive()
    notifier.stopping("draining")
    assert [manager.next() for _ in range(5)] == [
        ["STATUS=loading tiny"],
        ["EXTEND_TIMEOUT_USEC=1500000"],
        ["READY=1", "STATUS=online"],
        ["WATCHDOG=1"],
        ["STOPPING=1", "STATUS=draining"],
    ]


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": ""}])
def test_without_systemd_nothing_is_sent(environ, caplog):
    Notifier.from_environ(environ).ready("online")
    assert not caplog.records


def test_a_socket_that_is_gone_is_only_logged(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        Notifier(str(tmp_path / "gone")).ready("online")
    assert "READY=1" in caplog.text


@pytest.mark.parametrize(
    ("environ", "timeout_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "60000000"}, 60.0),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": str(os.getpid())}, 60.0),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "1"}, None),
    ],
)
def test_whether_systemd_watches_this_process(environ, timeout_s):
    assert watchdog_timeout_s(environ) == timeout_s


class Setting:
    """A watchdog of 30 s over two threads, at a time of the test's choice."""

    def __init__(self, manager):
        self.now = 0.0
        self.manager = manager
        self.link, self.engine = Heartbeat(), Heartbeat()
        self.threads = {"mqtt-link": self.link, "engine": self.engine}
        self.watchdog = Watchdog(Notifier(manager.address), lambda: self.threads, 30.0, clock=lambda: self.now)

    def pings_at(self, now):
        self.now = now
        self.watchdog.tick()
        return self.manager.hears("WATCHDOG=1", 0.01)


@pytest.fixture
def setting(manager):
    return Setting(manager)


def test_a_ping_at_a_third_of_the_timeout_while_both_threads_move(setting):
    for now, expected in ((1.0, False), (9.9, False), (10.0, True), (15.0, False), (20.0, True)):
        setting.link.beat()
        setting.engine.beat()
        assert setting.pings_at(now) == expected


@pytest.mark.parametrize("moving", ["link", "engine"])
def test_no_ping_while_one_thread_stands_still_and_again_when_it_moves(setting, moving, caplog):
    still = "engine" if moving == "link" else "link"
    for now in range(10, 60, 5):
        getattr(setting, moving).beat()
        assert not setting.pings_at(now)
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert f"no sign of life from {'mqtt-link' if still == 'link' else 'engine'}" in caplog.text
    getattr(setting, still).beat()
    assert setting.pings_at(60.0)
    # A new ping needs new beats.
    assert not setting.pings_at(70.0)


def test_an_excused_thread_may_stand_still_until_it_moves_again(setting):
    setting.engine.excuse(60.0)
    for now in (10, 20, 30):
        setting.link.beat()
        assert setting.pings_at(now)
    setting.engine.beat()
    setting.link.beat()
    assert setting.pings_at(40)
    setting.link.beat()
    assert not setting.pings_at(50)


def test_an_excuse_ends(setting):
    setting.engine.excuse(0.0)
    setting.link.beat()
    assert setting.pings_at(10)
    setting.link.beat()
    assert not setting.pings_at(20)


def test_threads_that_come_go_and_change_their_names_do_not_delay_a_ping(setting):
    for now in range(1, 60):
        if now % 7 == 0:
            # As during a switch: another engine comes first, and has the name of the old one afterwards.
            setting.threads["engine1"] = Heartbeat()
        if now % 7 == 3 and "engine1" in setting.threads:
            setting.threads["engine"] = setting.threads.pop("engine1")
        for heartbeat in setting.threads.values():
            heartbeat.beat()
        assert setting.pings_at(float(now)) == (now % 10 == 0)


def test_a_thread_that_has_got_another_name_must_move_all_the_same(setting):
    setting.link.beat()
    setting.engine.beat()
    assert setting.pings_at(10)
    setting.threads["engine1"] = setting.threads.pop("engine")
    setting.link.beat()
    assert not setting.pings_at(20)


def test_without_a_timeout_there_are_no_pings(manager):
    heartbeat = Heartbeat()
    watchdog = Watchdog(Notifier(manager.address), lambda: {"engine": heartbeat}, None)
    heartbeat.beat()
    watchdog.tick()
    assert not manager.hears("WATCHDOG=1", 0.01)
