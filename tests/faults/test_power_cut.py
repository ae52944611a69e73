"""Kills at every step of writing, and what had not been flushed is lost: old or new, never torn.

Snapshots have their own such test in tests/cache/test_store.py. A child is forked for each step from one process that
has everything loaded.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edge_llm.bundle.files import replace_file
from edge_llm.bundle.manifest import Bundle
from edge_llm.bundle.prepare import DATA_FILE, MODEL_FILE, _intact, prepared_graph
from edge_llm.cache.response_cache import ResponseCache
from edge_llm.cache.state_db import StateDb
from tests.faults.power_cut import NEW, OLD
from tests.paths import TINY_BUNDLE

ROOT = Path(__file__).parent.parent.parent


def cut(writer: str, folder: Path, model: Path | None = None) -> int:
    """Run a writer of power_cut.py in ``folder``/N for each step N, cut there; returns how many steps it has."""
    command = [sys.executable, "-m", "tests.faults.power_cut", writer, str(folder), str(model)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    return int(json.loads(result.stdout))


def test_a_file_that_is_replaced_is_the_old_or_the_new_one(tmp_path):
    steps = cut("replace", tmp_path)
    assert steps >= 6
    contents = [(tmp_path / str(step) / "file").read_bytes() for step in range(1, steps + 1)]
    assert set(contents) == {OLD, NEW}
    # Once it is the new one, it stays so.
    assert contents == sorted(contents, reverse=True)
    for step in range(1, steps + 1):
        replace_file(tmp_path / str(step) / "file", b"next")
        assert [path.name for path in (tmp_path / str(step)).iterdir()] == ["file"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A prepared copy, so that it need not be made by ONNX Runtime at every step."""
    return prepared_graph(Bundle.open(TINY_BUNDLE), "cpu-int8", tmp_path_factory.mktemp("model")).parent


def test_a_prepared_copy_is_whole_or_not_there(tmp_path, model):
    steps = cut("prepare", tmp_path, model)
    assert steps >= 12
    outcomes = set()
    for step in range(1, steps + 1):
        folders = [path for path in (tmp_path / str(step) / "prepared").glob("*") if not path.name.startswith(".")]
        assert len(folders) <= 1
        for folder in folders:
            assert _intact(folder), f"step {step}"
            for name in (MODEL_FILE, DATA_FILE):
                assert (folder / name).read_bytes() == (model / name).read_bytes()
        outcomes.add(len(folders))
    assert outcomes == {0, 1}
    # What a cut leaves behind is in nobody's way.
    for step in (1, steps // 2, steps - 3):
        assert _intact(prepared_graph(Bundle.open(TINY_BUNDLE), "cpu-int8", tmp_path / str(step)).parent)


def answers(path: Path) -> dict[int, str]:
    with contextlib.closing(StateDb.open(path)) as db:
        cache = ResponseCache(db, scope="00", max_entries=100, max_bytes=1 << 20)
        found = {number: cache.find("ann", number.to_bytes(32, "big")) for number in range(8)}
    return {number: response.text for number, response in found.items() if response is not None}


def test_the_state_file_holds_whole_answers_at_every_instruction(tmp_path, caplog):
    steps = cut("state", tmp_path)
    assert steps >= 20
    seen = []
    for step in range(1, steps + 1):
        found = answers(tmp_path / str(step) / "state.sqlite3")
        assert all(text in (f"old {number} " * 50, f"new {number} " * 50) for number, text in found.items())
        # One transaction wrote what is new: all of it, or none.
        new = {number for number, text in found.items() if text.startswith("new")}
        assert new in (set(), set(range(4)))
        assert set(found) == set(range(4))
        seen.append(bool(new))
    assert seen == sorted(seen)
    assert set(seen) == {False, True}
    assert "damaged" not in caplog.text


def test_a_state_file_whose_last_writes_are_torn_holds_whole_answers(tmp_path, caplog):
    """The log of changes (WAL) ends anywhere, or with anything, after a power cut: its frames carry checksums."""
    steps = cut("state", tmp_path)
    source = tmp_path / str(steps)
    log = (source / "state.sqlite3-wal").read_bytes()
    assert len(log) > 8192
    ends = sorted({*range(0, len(log), len(log) // 16), len(log)})
    for end in ends:
        for tail in (b"", bytes(512), b"\xa5" * 512):
            folder = tmp_path / f"torn-{end}"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            shutil.copy(source / "state.sqlite3", folder)
            (folder / "state.sqlite3-wal").write_bytes(log[:end] + tail)
            found = answers(folder / "state.sqlite3")
            new = {number for number, text in found.items() if text == f"new {number} " * 50}
            old = {number for number, text in found.items() if text == f"old {number} " * 50}
            assert new | old == set(found)
            assert new in (set(), set(range(4)))
    assert new == set(range(4)), "the whole log, with rubbish behind it, is the new state"
