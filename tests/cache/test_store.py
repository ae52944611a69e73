"""Snapshots: the whole right prefix, or none, whatever happens to the process, the disk or the file."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_llm.bundle.manifest import ModelDims
from edge_llm.bundle.prefix_file import PrefixKV, snapshot_key
from edge_llm.cache import store as store_module
from edge_llm.cache.store import MAX_PENDING, SnapshotStore

ROOT = Path(__file__).parent.parent.parent
DIMS = ModelDims(
    architecture="llama",
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    hidden_size=32,
    vocab_size=512,
    max_seq_len=64,
)
KEY = snapshot_key("one bundle")
TIMEOUT_S = 30.0


def make_prefix(*token_ids: int) -> PrefixKV:
    shape = (len(token_ids), DIMS.num_layers, 2, DIMS.num_kv_heads, DIMS.head_dim)
    return PrefixKV(token_ids, np.random.default_rng(token_ids).standard_normal(shape, np.float32))


PREFIX = make_prefix(1, 2, 3)
OTHER = make_prefix(4, 5)


def make_store(folder: Path, key: str = KEY, max_bytes: int = 1 << 20) -> SnapshotStore:
    return SnapshotStore(folder, key, DIMS, "float32", max_bytes)


def save(folder: Path, *prefixes: PrefixKV, key: str = KEY, max_bytes: int = 1 << 20) -> None:
    store = make_store(folder, key, max_bytes)
    for prefix in prefixes:
        store.save(prefix)
    assert store.flush(TIMEOUT_S)
    store.close()


def load(folder: Path, key: str = KEY, max_bytes: int = 1 << 20) -> dict[tuple[int, ...], bytes]:
    return contents(make_store(folder, key, max_bytes).load_all())


def contents(prefixes: list[PrefixKV]) -> dict[tuple[int, ...], bytes]:
    by_ids = {prefix.token_ids: prefix.kv.tobytes() for prefix in prefixes}
    assert len(by_ids) == len(prefixes)
    return by_ids


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "snapshots"


@pytest.fixture(autouse=True)
def _log(caplog):
    caplog.set_level(logging.INFO, logger="edge_llm")


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_what_is_saved_is_there_after_a_restart(folder, caplog):
    assert load(folder) == {}
    save(folder, PREFIX, OTHER)
    assert load(folder) == contents([PREFIX, OTHER])
    assert [name[:17] for name in names(folder)] == [KEY[:16] + "-"] * 2
    assert warnings(caplog) == []


def test_only_the_owner_may_look_into_the_folder(folder):
    save(folder, PREFIX)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_the_same_prefix_is_written_once(folder, monkeypatch):
    writes = []
    real_write = store_module.write_prefix_file
    monkeypatch.setattr(store_module, "write_prefix_file", lambda *args: (writes.append(args), real_write(*args)))
    save(folder, PREFIX, PREFIX)
    save(folder, PREFIX)
    assert len(writes) == 1
    assert load(folder) == contents([PREFIX])


def test_the_most_recently_used_comes_last(folder):
    save(folder, PREFIX, OTHER)
    set_times(folder, PREFIX, OTHER)
    assert list(load(folder)) == [PREFIX.token_ids, OTHER.token_ids]
    set_times(folder, OTHER, PREFIX)
    assert list(load(folder)) == [OTHER.token_ids, PREFIX.token_ids]


def set_times(folder: Path, *prefixes: PrefixKV, key: str = KEY, start_s: int = 1000) -> None:
    for seconds, prefix in enumerate(prefixes):
        os.utime(make_store(folder, key)._path(prefix.token_ids), (start_s + seconds, start_s + seconds))


# A killed writer.

# Runs `save` in a process that kills itself right before the n-th call of a function that touches the disk, or in the
# middle of it if it is a write.
KILLED_SAVE = """
import fcntl, os, signal, sys
from pathlib import Path
from tests.cache.test_store import PREFIX, make_store

deadly, folder = int(sys.argv[1]), Path(sys.argv[2])
calls = 0

def guarded(module, name):
    real = getattr(module, name)
    def call(*arguments, **keywords):
        global calls
        calls += 1
        if calls == deadly:
            if name == "write":
                real(arguments[0], arguments[1][: len(arguments[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **keywords)
    setattr(module, name, call)

store = make_store(folder)
for name in ("mkdir", "open", "write", "fsync", "replace", "rename", "unlink", "close", "utime", "scandir"):
    guarded(os, name)
guarded(fcntl, "flock")
store.save(PREFIX)
assert store.flush(30)
print(calls, "calls")
"""


def killed_save(deadly: int, folder: Path) -> bool:
    """Whether the child was killed; otherwise it has come to its end."""
    command = [sys.executable, "-c", KILLED_SAVE, str(deadly), str(folder)]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode in (0, -signal.SIGKILL), result.stderr
    return result.returncode != 0


def test_a_writer_killed_at_any_step_leaves_all_or_nothing(tmp_path, caplog):
    outcomes = []
    deadly = 1
    while killed_save(deadly, tmp_path / str(deadly) / "snapshots"):
        # As the kill left it, for a daemon that starts now, and for one that saves first.
        folder = tmp_path / str(deadly) / "snapshots"
        copy = tmp_path / str(deadly) / "copy"
        if folder.exists():
            shutil.copytree(folder, copy)
        loaded = load(folder)
        assert loaded in ({}, contents([PREFIX]))
        outcomes.append((bool(loaded), folder.exists() and len(names(folder)) > len(loaded)))
        for place in (folder, copy):
            save(place, PREFIX)
            assert len(names(place)) == 1
            assert load(place) == contents([PREFIX])
        deadly += 1
    assert load(tmp_path / str(deadly) / "snapshots") == contents([PREFIX])
    # Before, in and after: mkdir, open, flock, four writes, fsync, rename, fsync of the folder.
    assert len(outcomes) >= 12
    assert {whole for whole, _ in outcomes} == {True, False}
    assert not any(leftover for _, leftover in outcomes), "load_all tidies up, too"
    assert warnings(caplog) == []


def test_kills_do_leave_temporary_files_for_the_test_above_to_find(tmp_path):
    folder = tmp_path / "snapshots"
    left = []
    for deadly in range(1, 10):
        assert killed_save(deadly, folder)
        left += [name for name in names(folder) if name.endswith(".tmp")] if folder.exists() else []
    assert left


# A damaged file.


@pytest.mark.parametrize("part", range(0, 100, 5))
@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_snapshot_is_a_miss_with_one_line(folder, caplog, damage, part):
    save(folder, PREFIX, OTHER)
    path = make_store(folder)._path(PREFIX.token_ids)
    raw = bytearray(path.read_bytes())
    at = len(raw) * part // 100
    if damage == "flip":
        raw[at] ^= 1 << part % 8
    else:
        del raw[at:]
    path.write_bytes(raw)
    assert load(folder) == contents([OTHER])
    assert len(warnings(caplog)) == 1
    assert path.name in warnings(caplog)[0]
    assert not path.exists()
    assert load(folder) == contents([OTHER])
    assert len(warnings(caplog)) == 1
    save(folder, PREFIX)
    assert load(folder) == contents([PREFIX, OTHER])


def test_another_models_file_under_this_key_is_damage(folder, caplog):
    save(folder, PREFIX)
    dims = msgspec.structs.replace(DIMS, num_layers=3)
    assert SnapshotStore(folder, KEY, dims, "float32", 1 << 20).load_all() == []
    assert len(warnings(caplog)) == 1


# A disk that takes no more.


def test_a_full_disk_is_one_line_and_no_more(folder, caplog, monkeypatch):
    save(folder, PREFIX)
    store = make_store(folder)
    with monkeypatch.context() as context:
        context.setattr(os, "write", no_space)
        for token in range(5):
            store.save(make_prefix(token, 1))
        assert store.flush(TIMEOUT_S)
    assert warnings(caplog) == ["a snapshot is not saved: [Errno 28] No space left on device"]
    assert len(names(folder)) == 1
    # Space again: it goes on, and the next time that it is full is news.
    store.save(OTHER)
    assert store.flush(TIMEOUT_S)
    assert load(folder) == contents([PREFIX, OTHER])
    with monkeypatch.context() as context:
        context.setattr(os, "write", no_space)
        store.save(make_prefix(9, 9))
        assert store.flush(TIMEOUT_S)
    assert len(warnings(caplog)) == 2
    store.close()


def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_limit_of_the_system_in_the_middle_of_a_file(folder):
    program = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from tests.cache.test_store import PREFIX, make_store\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))\n"
        "store = make_store(Path(sys.argv[1]))\n"
        "store.save(PREFIX)\n"
        "assert store.flush(30)\n"
        "assert store.load_all() == []\n"
    )
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, str(folder)]
    result = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr.count("\n")) == (0, 1), result.stderr
    assert "File too large" in result.stderr
    assert names(folder) == []


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_folder_that_may_not_be_written_is_one_line(folder, caplog, monkeypatch, code):
    folder.mkdir()
    real_open = os.open

    def refuse(path, flags, *rest, **keywords):
        if flags & os.O_CREAT:
            raise OSError(code, os.strerror(code), str(path))
        return real_open(path, flags, *rest, **keywords)

    monkeypatch.setattr(os, "open", refuse)
    save(folder, PREFIX, OTHER)
    assert len(warnings(caplog)) == 1
    assert os.strerror(code) in warnings(caplog)[0]
    assert load(folder) == {}


def test_a_file_where_the_folder_should_be_is_one_line_each_way(folder, caplog):
    folder.write_text("a file")
    save(folder, PREFIX, OTHER)
    assert len(warnings(caplog)) == 1
    assert load(folder) == {}
    assert len(warnings(caplog)) == 2
    assert folder.read_text() == "a file"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(folder, caplog):
    save(folder, PREFIX)
    folder.chmod(0o500)
    try:
        save(folder, OTHER)
        assert load(folder) == contents([PREFIX])
    finally:
        folder.chmod(0o700)
    assert len(warnings(caplog)) == 1


def test_a_file_that_cannot_be_read_is_a_miss_but_stays(folder, caplog, monkeypatch):
    save(folder, PREFIX)

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as context:
        context.setattr(store_module, "read_prefix_file", fail)
        assert load(folder) == {}
    assert len(warnings(caplog)) == 1
    assert load(folder) == contents([PREFIX])


# Bounds.


def file_size(folder: Path, prefix: PrefixKV, key: str = KEY) -> int:
    return make_store(folder, key)._path(prefix.token_ids).stat().st_size


def test_another_key_is_a_miss_and_its_files_stay_for_going_back(folder, caplog):
    save(folder, PREFIX)
    new = snapshot_key("a new bundle")
    assert load(folder, new) == {}
    assert warnings(caplog) == []
    assert len(caplog.records) == 1
    save(folder, OTHER, key=new)
    assert load(folder, new) == contents([OTHER])
    assert load(folder) == contents([PREFIX])


def test_of_old_keys_only_the_last_used_stays(folder):
    first, second, third = (snapshot_key(str(number)) for number in range(3))
    for number, key in enumerate((first, second)):
        save(folder, PREFIX, key=key)
        set_times(folder, PREFIX, key=key, start_s=1000 + number)
    # Loading is using: the second is the one before last now.
    assert load(folder, first) == contents([PREFIX])
    save(folder, PREFIX, key=third)
    assert {name[:16] for name in names(folder)} == {first[:16], third[:16]}
    assert load(folder, snapshot_key("new")) == {}
    assert {name[:16] for name in names(folder)} == {third[:16]}


def test_bytes_are_bounded_and_other_keys_go_first(folder):
    old = snapshot_key("the bundle before")
    prefixes = [make_prefix(number, number) for number in range(4)]
    save(folder, prefixes[0], key=old)
    size = file_size(folder, prefixes[0], old)
    save(folder, *prefixes[:2], max_bytes=3 * size)
    assert len(names(folder)) == 3
    set_times(folder, *prefixes[:2])
    save(folder, prefixes[2], max_bytes=3 * size)
    assert load(folder) == contents(prefixes[:3])
    assert load(folder, old) == {}
    set_times(folder, *prefixes[:3])
    save(folder, prefixes[3], max_bytes=3 * size)
    assert load(folder) == contents(prefixes[1:])
    set_times(folder, *prefixes[1:])
    assert load(folder, max_bytes=2 * size - 1) == contents(prefixes[3:])
    assert len(names(folder)) == 1


def test_the_newest_stays_though_the_clock_went_back(folder):
    prefixes = [make_prefix(number, number) for number in range(3)]
    save(folder, *prefixes[:2])
    size = file_size(folder, prefixes[0])
    set_times(folder, *prefixes[:2], start_s=2**32)
    save(folder, prefixes[2], max_bytes=2 * size)
    assert load(folder) == contents(prefixes[1:])


def test_what_is_larger_than_the_bound_is_not_written(folder, caplog):
    save(folder, OTHER)
    size = file_size(folder, OTHER)
    save(folder, PREFIX, max_bytes=size)
    assert "allowed for all" in warnings(caplog)[0]
    # The values alone fit, with their header they do not: the bound holds.
    save(folder, make_prefix(8, 8), max_bytes=size - 1)
    assert load(folder) == {}


# The thread.


class HeldWriter:
    """Lets a test look at a store while its thread is in the middle of a write."""

    def __init__(self, monkeypatch) -> None:
        self.entered = threading.Semaphore(0)
        self.go_on = threading.Semaphore(0)
        self.real = store_module.write_prefix_file
        monkeypatch.setattr(store_module, "write_prefix_file", self.write)

    def write(self, *arguments) -> None:
        self.entered.release()
        assert self.go_on.acquire(timeout=TIMEOUT_S)
        self.real(*arguments)


def test_save_never_waits_and_the_queue_is_bounded(folder, caplog, monkeypatch):
    held = HeldWriter(monkeypatch)
    store = make_store(folder)
    prefixes = [make_prefix(number, 1) for number in range(MAX_PENDING + 2)]
    store.save(prefixes[0])
    assert held.entered.acquire(timeout=TIMEOUT_S)
    for prefix in prefixes[1:]:
        store.save(prefix)
    assert len(warnings(caplog)) == 1
    assert not store.flush(0.001)
    held.go_on.release(MAX_PENDING + 1)
    assert store.flush(TIMEOUT_S)
    store.close()
    assert load(folder) == contents(prefixes[:-1])


def test_close_writes_what_is_queued_and_takes_nothing_more(folder):
    store = make_store(folder)
    store.save(PREFIX)
    store.save(OTHER)
    store.close(TIMEOUT_S)
    store.save(make_prefix(9, 9))
    store.close()
    assert store.flush(TIMEOUT_S)
    assert load(folder) == contents([PREFIX, OTHER])


def test_a_store_that_saved_nothing_has_no_thread_and_no_folder(folder):
    before = threading.active_count()
    store = make_store(folder)
    assert store.load_all() == []
    assert store.flush(TIMEOUT_S)
    assert store.clear() == 0
    assert threading.active_count() == before
    store.close()
    assert not folder.exists()


def test_a_fault_in_writing_does_not_end_the_writer(folder, caplog, monkeypatch):
    store = make_store(folder)
    with monkeypatch.context() as context:
        context.setattr(store_module, "write_prefix_file", lambda *_: 1 // 0)
        store.save(PREFIX)
        assert store.flush(TIMEOUT_S)
    assert len(warnings(caplog)) == 1
    store.save(OTHER)
    assert store.flush(TIMEOUT_S)
    store.close()
    assert load(folder) == contents([OTHER])


def test_clear_leaves_nothing_of_any_key_and_nothing_that_was_queued(folder, monkeypatch):
    save(folder, PREFIX, key=snapshot_key("another"))
    (folder / "notes.txt").write_text("not ours")
    held = HeldWriter(monkeypatch)
    store = make_store(folder)
    store.save(PREFIX)
    assert held.entered.acquire(timeout=TIMEOUT_S)
    store.save(OTHER)
    counts = []
    clearing = threading.Thread(target=lambda: counts.append(store.clear()))
    clearing.start()
    held.go_on.release()
    clearing.join(TIMEOUT_S)
    assert counts == [2]
    assert names(folder) == ["notes.txt"]
    store.save(OTHER)
    held.go_on.release()
    assert store.flush(TIMEOUT_S)
    store.close()
    assert load(folder) == contents([OTHER])


def test_clear_says_when_it_cannot(folder, monkeypatch):
    save(folder, PREFIX)

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(PermissionError):
        make_store(folder).clear()


# Two daemons.


def test_two_stores_at_once_share_a_folder(folder, caplog):
    prefixes = [make_prefix(number, 1) for number in range(12)]
    keys = [KEY, KEY, snapshot_key("another")]
    stores = [make_store(folder, key) for key in keys]
    start = threading.Barrier(len(stores))

    def work(store: SnapshotStore) -> None:
        start.wait()
        for prefix in prefixes:
            store.save(prefix)
            store.load_all()
        assert store.flush(TIMEOUT_S)

    threads = [threading.Thread(target=work, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    for store in stores:
        store.close()
    assert warnings(caplog) == []
    assert all(load(folder, key) == contents(prefixes) for key in keys)
    assert len(names(folder)) == 2 * len(prefixes)


def test_what_another_daemon_deletes_on_the_way_is_a_quiet_miss(folder, caplog, monkeypatch):
    save(folder, PREFIX, OTHER)
    real_read = store_module.read_prefix_file

    def read(path, *rest):
        if path == make_store(folder)._path(PREFIX.token_ids):
            path.unlink()
        return real_read(path, *rest)

    monkeypatch.setattr(store_module, "read_prefix_file", read)
    assert load(folder) == contents([OTHER])
    assert warnings(caplog) == []


def test_files_of_other_names_and_links_are_left_alone(folder, tmp_path):
    save(folder, PREFIX)
    elsewhere = tmp_path / "elsewhere.kv"
    elsewhere.write_bytes(b"not ours")
    link = folder / f"{'0' * 16}-{'0' * 32}.kv"
    link.symlink_to(elsewhere)
    (folder / "notes.kv").write_bytes(b"not ours")
    assert load(folder, snapshot_key("x"), max_bytes=1) == {}
    assert make_store(folder).clear() == 0
    assert names(folder) == [link.name, "notes.kv"]
    assert elsewhere.read_bytes() == b"not ours"
