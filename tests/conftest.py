"""Fixtures that every test may use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.brokers import IotCore, Mosquitto


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
