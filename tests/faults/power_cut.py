"""Writers that lose their power at each of their steps, one forked child for each.

    python -m tests.faults.power_cut WRITER FOLDER MODEL

The n-th child works in FOLDER/n and ends, with SIGKILL, just before its n-th call that touches the disk (SQLite: its
n-th dozen of instructions). What it has written with Python and not flushed by then is half lost, as with the power.
Prints how many steps there were: the last child came to its end.
"""

from __future__ import annotations

import builtins
import os
import shutil
import signal
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from edge_llm.bundle import prepare
from edge_llm.bundle.files import replace_file
from edge_llm.bundle.incoming import install
from edge_llm.bundle.manifest import Bundle
from edge_llm.bundle.store import BundleStore, Health
from edge_llm.cache.response_cache import CachedResponse, ResponseCache
from edge_llm.cache.state_db import StateDb
from tests.paths import TINY_BUNDLE

OLD, NEW = b"old " * 3000, b"new and longer " * 3000
CALLS = ("mkdir", "open", "fsync", "replace", "rename", "unlink", "rmdir")
INSTRUCTIONS = 12


class Power:
    """Counts steps, and ends the process at one of them."""

    def __init__(self, folder: Path, deadly: int) -> None:
        self._folder = folder
        self._deadly = deadly
        self.steps = 0
        self._flushed: set[int] = set()

    def step(self) -> None:
        self.steps += 1
        if self.steps == self._deadly:
            self.lose_unflushed()
            os.kill(os.getpid(), signal.SIGKILL)

    def lose_unflushed(self) -> None:
        for path in self._folder.rglob("*"):
            # SQLite flushes by itself, where this cannot see it.
            if path.is_file() and "sqlite" not in path.name and path.stat().st_ino not in self._flushed:
                os.truncate(path, path.stat().st_size // 2)

    def keep(self) -> None:
        """What is there now has been on the disk for long."""
        self._flushed |= {path.stat().st_ino for path in self._folder.rglob("*")}

    def guard(self) -> None:
        for name in CALLS:
            setattr(os, name, self._guarded(getattr(os, name)))
        real_open, real_fsync = builtins.open, os.fsync
        builtins.open = self._guarded(real_open)  # type: ignore[assignment]

        def fsync(descriptor: int) -> None:
            real_fsync(descriptor)
            self._flushed.add(os.fstat(descriptor).st_ino)

        os.fsync = fsync  # type: ignore[assignment]

    def _guarded(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            self.step()
            return real(*arguments, **keywords)

        return call


def replace(folder: Path, power: Power, _model: Path) -> None:
    (folder / "file").write_bytes(OLD)
    power.keep()
    power.guard()
    replace_file(folder / "file", NEW)


def prepare_copy(folder: Path, power: Power, model: Path) -> None:
    def build(command: list[str], **_options: Any) -> Any:
        for name in (prepare.MODEL_FILE, prepare.DATA_FILE):
            power.step()
            shutil.copyfile(model / name, Path(command[-1]) / name)
        return SimpleNamespace(returncode=0)

    prepare.subprocess.run = build  # type: ignore[assignment]
    bundle = Bundle.open(TINY_BUNDLE)
    power.guard()
    prepare.prepared_graph(bundle, "cpu-int8", folder)


def state(folder: Path, power: Power, _model: Path) -> None:
    path = folder / "state.sqlite3"
    db = StateDb.open(path)
    cache = ResponseCache(db, scope="00", max_entries=100, max_bytes=1 << 20)
    for number in range(4):
        cache.put("ann", number.to_bytes(32, "big"), _answer("old", number))
    assert db.flush(60)
    writer: sqlite3.Connection = db._connections.writer
    writer.set_progress_handler(power.step, INSTRUCTIONS)
    for number in range(4):
        cache.put("ann", number.to_bytes(32, "big"), _answer("new", number))
    assert db.flush(60)


def _answer(age: str, number: int) -> CachedResponse:
    return CachedResponse(f"{age} {number} " * 50, "stop", 3, 4)


def install_bundle(folder: Path, power: Power, _model: Path) -> None:
    power.guard()
    install(BundleStore(folder / "store"), TINY_BUNDLE)


def activate_bundle(folder: Path, power: Power, _model: Path) -> None:
    """As a switch and the next start do it: asked for, committed, started, ready."""
    store = BundleStore(folder / "store")
    store.activated("a" * 64)
    power.keep()
    power.guard()
    store.want("b" * 64)
    store.activated("b" * 64)
    store.begin_start()
    store.end_start()


def roll_back_bundle(folder: Path, power: Power, _model: Path) -> None:
    store = BundleStore(folder / "store")
    for digest in ("a" * 64, "b" * 64):
        store.path(digest).mkdir(parents=True)
        store.activated(digest)
    for _ in range(3):
        store.begin_start()
    power.keep()
    power.guard()
    store.begin_start()
    health = Health(ok=False, at="", kind="crash_loop", detail="3 starts without getting ready")
    store.roll_back({"b" * 64: health}, "a" * 64)
    store.end_start()


def remove_bundle(folder: Path, power: Power, _model: Path) -> None:
    store = BundleStore(folder / "store")
    bundle, _ = install(store, TINY_BUNDLE)
    store.activated(bundle.digest)
    store.activated("b" * 64)
    power.keep()
    power.guard()
    store.remove(bundle.digest)


WRITERS = {
    "install": install_bundle,
    "activate": activate_bundle,
    "roll_back": roll_back_bundle,
    "remove": remove_bundle,
    "replace": replace,
    "prepare": prepare_copy,
    "state": state,
}


def main(writer: str, folder: Path, model: Path) -> None:
    deadly = 0
    while True:
        deadly += 1
        child = os.fork()
        if child == 0:
            own = folder / str(deadly)
            own.mkdir(parents=True)
            power = Power(own, deadly)
            WRITERS[writer](own, power, model)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            print(deadly)
            return
        assert os.WTERMSIG(status) == signal.SIGKILL


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
