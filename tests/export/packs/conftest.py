"""Packs in memory and on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.packs.pack import Pack, load_pack
from tests.export.packs.small_pack import write_pack

VEHICLE = Path(__file__).parents[3] / "examples" / "vehicle"


@pytest.fixture
def pack_folder(tmp_path: Path) -> Path:
    """The kitchen's files, to be spoilt."""
    return write_pack(tmp_path / "kitchen")


@pytest.fixture(scope="session")
def kitchen(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return load_pack(write_pack(tmp_path_factory.mktemp("packs") / "kitchen"))


@pytest.fixture(scope="session")
def vehicle() -> Pack:
    return load_pack(VEHICLE)
