from __future__ import annotations

import logging

import pytest

from edge_llm.config import MqttConfig
from edge_llm.mqtt.patience import Patience

CONFIG = MqttConfig(reconnect_min_s=0.25, reconnect_max_s=4.0)


@pytest.fixture
def patience() -> Patience:
    return Patience(CONFIG, "car7")


def test_each_failure_doubles_the_wait_up_to_the_longest(patience):
    for longest in (0.25, 0.5, 1.0, 2.0, 4.0, 4.0, *[4.0] * 2000):
        assert longest / 2 <= patience.wait_s(0.0, was_answered=False) <= longest


@pytest.mark.parametrize(("lasted_s", "was_answered"), [(4.1, True), (3.9, True), (60.0, False)])
def test_only_a_connection_that_stood_begins_anew(patience, lasted_s, was_answered):
    for _ in range(6):
        patience.wait_s(0.0, was_answered=True)
    begins_anew = lasted_s > CONFIG.reconnect_max_s and was_answered
    assert (patience.wait_s(lasted_s, was_answered=was_answered) <= CONFIG.reconnect_min_s) == begins_anew


def test_connections_that_end_soon_are_told_once(patience, caplog):
    caplog.set_level(logging.WARNING)
    for ends in (1, 2):
        patience.note_end(1.0, was_accepted=True, wanted=False)
        assert not caplog.records, ends
    for _ in range(5):
        patience.note_end(1.0, was_accepted=True, wanted=False)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "'car7'" in caplog.text


@pytest.mark.parametrize(("lasted_s", "was_accepted"), [(60.0, True), (1.0, False)])
def test_one_that_lasted_or_was_refused_ends_the_row(patience, caplog, lasted_s, was_accepted):
    for _ in range(4):
        patience.note_end(1.0, was_accepted=True, wanted=False)
        patience.note_end(1.0, was_accepted=True, wanted=False)
        patience.note_end(lasted_s, was_accepted=was_accepted, wanted=False)
    assert not caplog.records


def test_a_stop_is_no_suspicion(patience, caplog):
    for _ in range(5):
        patience.note_end(1.0, was_accepted=True, wanted=True)
    assert not caplog.records
