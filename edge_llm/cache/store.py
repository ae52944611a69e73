"""Snapshots: prefixes that are saved on the device, so that they are warm after a restart.

One file a prefix (bundle/prefix_file.py), in one flat folder. A file that is of another bundle or other settings, or
damaged, is as good as none. Several daemons may share the folder: files appear whole, by a rename, and whatever
vanishes was only a copy of what can be computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from edge_llm.bundle.prefix_file import (
    PrefixKV,
    read_prefix_file,
    remove_leftovers,
    snapshot_key,
    write_prefix_file,
)
from edge_llm.errors import PrefixFileError

if TYPE_CHECKING:
    from edge_llm.bundle.manifest import ModelDims

__all__ = ["MAX_PENDING", "SNAPSHOT_FOLDER", "SnapshotStore", "snapshot_key"]

_log = logging.getLogger(__name__)

# Under the folder of the device-local copies.
SNAPSHOT_FOLDER: Final = "prefixes"
# Prefixes that wait for the disk. They are made one by one and far more slowly than a disk writes.
MAX_PENDING: Final = 16
_NAME_PATTERN: Final = re.compile(r"([0-9a-f]{16})-[0-9a-f]{32}\.kv")
_KEY_CHARACTERS: Final = 16


@dataclass(frozen=True)
class _File:
    """A snapshot as the folder lists it. ``key`` is the beginning of its key."""

    path: Path
    key: str
    used_ns: int
    size_bytes: int


class SnapshotStore:
    """The saved prefixes of one folder. ``save`` only queues: a thread of the store's own writes.

    Nothing here fails its caller: what cannot be read is a miss, what cannot be written is not saved, with one log
    line each.

    Args:
        folder: where the files are; it is made by the first save. Files of other names are left alone.
        key: what the saved values depend on, from ``snapshot_key``: the bundle's digest, the graph's target, the
            rendered template, the context, the cache's element type, onnxruntime's version, the processor's features.
        dims: the model's shape.
        kv_dtype: the cache's element type, ``float32`` or ``float16``.
        max_bytes: of all files together, of whichever key.
    """

    def __init__(self, folder: Path, key: str, dims: ModelDims, kv_dtype: str, max_bytes: int) -> None:
        assert re.fullmatch("[0-9a-f]{64}", key), "the key comes from snapshot_key"
        self._folder = folder
        self._key = key
        self._dims = dims
        self._kv_dtype = kv_dtype
        self._max_bytes = max_bytes
        self._changed = threading.Condition()
        # Guarded by the condition.
        self._pending: deque[PrefixKV] = deque()
        self._writing = False
        self._closed = False
        self._writer: threading.Thread | None = None
        # The writer's own: a disk stays full for long, and one line says so.
        self._failing = False

    def load_all(self) -> list[PrefixKV]:
        """The prefixes that were saved under this key, the most recently used last.

        Deletes what is damaged, what killed writers left behind, and what is too much: files of the keys before the
        last two, and the files used longest ago beyond ``max_bytes``. A key is kept beside the own one for going back
        to the previous bundle.
        """
        remove_leftovers(self._folder)
        try:
            files = self._tidy()
        except OSError as error:
            _log.warning("the snapshots cannot be read: %s", error)
            return []
        own = [file for file in files if file.key == self._key[:_KEY_CHARACTERS]]
        if files and not own:
            _log.info("the snapshots are of another bundle, other settings or another runtime: none is used")
        prefixes = []
        for file in own:
            prefix = self._load(file.path)
            if prefix is not None:
                prefixes.append(prefix)
        return prefixes

    def save(self, prefix: PrefixKV) -> None:
        """Have a prefix written soon; returns at once. The caller must not change the array from now on."""
        with self._changed:
            if self._closed:
                return
            if len(self._pending) >= MAX_PENDING:
                _log.warning("a snapshot is not saved: %d others still wait for the disk", MAX_PENDING)
                return
            self._pending.append(prefix)
            if self._writer is None:
                # A daemon thread: a disk that hangs must not keep the process from ending.
                self._writer = threading.Thread(target=self._run, name="snapshots", daemon=True)
                self._writer.start()
            self._changed.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything saved so far is on the disk, or could not be written; False if time ran out."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._pending and not self._writing, timeout_s)

    def close(self, timeout_s: float = 10.0) -> None:
        """Write what is still queued, for at most ``timeout_s`` seconds, and take nothing more."""
        with self._changed:
            self._closed = True
            writer = self._writer
            self._changed.notify_all()
        if writer is not None:
            writer.join(timeout_s)

    def clear(self) -> int:
        """Delete every snapshot of every key, queued ones included; returns how many files there were.

        Raises:
            OSError: a file cannot be deleted. Who asks for this must know.
        """
        with self._changed:
            self._pending.clear()
            self._changed.wait_for(lambda: not self._writing)
            remove_leftovers(self._folder)
            files = self._files()
            for file in files:
                file.path.unlink(missing_ok=True)
            return len(files)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._closed)
                if not self._pending:
                    return
                prefix = self._pending.popleft()
                self._writing = True
            try:
                self._write(prefix)
                self._failing = False
            except Exception as error:
                # Whatever it is, the next prefix may do better, and serving does not depend on it.
                if not self._failing:
                    _log.warning("a snapshot is not saved: %s", error, extra={"path": str(self._folder)})
                self._failing = True
            del prefix  # its memory is not the store's while it waits
            with self._changed:
                self._writing = False
                self._changed.notify_all()

    def _write(self, prefix: PrefixKV) -> None:
        if prefix.kv.nbytes > self._max_bytes:
            raise ValueError(f"it has {prefix.kv.nbytes} bytes, {self._max_bytes} are allowed for all")
        # What is kept can be turned into the words of a system prompt again: nobody else's business.
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        remove_leftovers(self._folder)
        path = self._path(prefix.token_ids)
        if path.exists():
            # The same key and tokens, so the same values: the flash memory of a small board wears out.
            _mark_used(path)
        else:
            write_prefix_file(path, prefix, self._key)
        self._tidy(newest=path)

    def _load(self, path: Path) -> PrefixKV | None:
        try:
            prefix = read_prefix_file(path, self._key, self._dims, self._kv_dtype)
        except FileNotFoundError:
            return None  # another daemon has tidied up
        except OSError as error:
            _log.warning("a snapshot cannot be read and is not used: %s", error)
            return None
        except PrefixFileError as error:
            _log.warning("a snapshot is not used and is deleted: %s", error)
            _delete(path)
            return None
        _mark_used(path)
        return prefix

    def _tidy(self, newest: Path | None = None) -> list[_File]:
        """Keep to the bounds; returns what stays, the file used longest ago first.

        Args:
            newest: the last to go, whatever its time says: a board without a battery for its clock may start in 1970.
        """
        own = self._key[:_KEY_CHARACTERS]
        files = self._files()
        others = [file.key for file in files if file.key != own]
        kept_keys = {own, *others[-1:]}
        excess = sum(file.size_bytes for file in files if file.key in kept_keys) - self._max_bytes
        # Other keys' files first: they are of no use now.
        stays = []
        for file in sorted(files, key=lambda file: (file.path == newest, file.key == own, file.used_ns)):
            if file.key not in kept_keys:
                _delete(file.path)
            elif excess > 0:
                _delete(file.path)
                excess -= file.size_bytes
            else:
                stays.append(file)
        return stays

    def _files(self) -> list[_File]:
        """Every snapshot in the folder, the one used longest ago first. Raises ``OSError`` if it cannot be listed."""
        files = []
        try:
            with os.scandir(self._folder) as entries:
                for entry in entries:
                    match = _NAME_PATTERN.fullmatch(entry.name)
                    if match is None:
                        continue
                    # Another daemon may delete it at this moment.
                    with contextlib.suppress(FileNotFoundError):
                        if entry.is_file(follow_symlinks=False):
                            status = entry.stat(follow_symlinks=False)
                            files.append(_File(Path(entry.path), match[1], status.st_mtime_ns, status.st_size))
        except FileNotFoundError:
            return []  # nothing was ever saved
        return sorted(files, key=lambda file: (file.used_ns, file.path))

    def _path(self, token_ids: tuple[int, ...]) -> Path:
        digest = hashlib.sha256(np.asarray(token_ids, "<u4").tobytes()).hexdigest()
        return self._folder / f"{self._key[:_KEY_CHARACTERS]}-{digest[:32]}.kv"


def _mark_used(path: Path) -> None:
    """The time of change tells what was used last; a folder that is only readable keeps its times."""
    with contextlib.suppress(OSError):
        os.utime(path)


def _delete(path: Path) -> None:
    """Delete a file that is of no use; one that cannot be deleted is found and left out again next time."""
    with contextlib.suppress(OSError):
        path.unlink()
