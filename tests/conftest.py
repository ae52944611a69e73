"""Fixtures that every test may use."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.brokers import IotCore, Mosquitto


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """A command that a test runs in this process sets up logging; the next test must not feel it."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


@pytest.fixture
def mosquitto(tmp_path: Path) -> Iterator[Mosquitto]:
    """A mosquitto of its own for one test, without access control."""
    folder = tmp_path / "mosquitto"
    folder.mkdir()
    broker = Mosquitto(folder)
    broker.start()
    yield broker
    broker.stop()


@pytest.fixture
def iotcore(tmp_path: Path) -> Iterator[IotCore]:
    """An iotcore (rumqttd) of its own for one test, speaking MQTT 5."""
    folder = tmp_path / "iotcore"
    folder.mkdir()
    broker = IotCore(folder)
    broker.start()
    yield broker
    broker.stop()
