"""The device-local copy of a graph, with weights already packed for this processor and mapped from the file.

Loading it takes a fraction of the time, and its weights are file-backed memory that the system can drop and read
again, instead of anonymous memory that it cannot. A copy is keyed by everything that it depends on, and checked by hash
at every start: a stale or damaged one is built anew, never used.

ONNX Runtime session options used here: ``optimized_model_filepath`` and
``session.save_external_prepacked_constant_initializers`` (onnxruntime_session_options_config_keys.h).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import mmap
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path
from typing import Final

import msgspec
import onnxruntime as ort

from edge_llm.bundle.files import flush_to_disk
from edge_llm.bundle.manifest import Bundle, Graph, sha256_file
from edge_llm.device.child import CHILD_FOLDER, child_command, end_first_without_memory, signal_name
from edge_llm.device.cpu import cpu_features
from edge_llm.device.session import make_session, session_options
from edge_llm.errors import BundleError, ProviderError

_log = logging.getLogger(__name__)

MODEL_FILE: Final = "model.onnx"
DATA_FILE: Final = "model.data"
SEAL_FILE: Final = "prepared.json"
# The build holds the weights twice; minutes only on the slowest boards.
BUILD_TIMEOUT_S: Final = 1800
# A matrix and its scales must both lie in the data file: onnxruntime 1.31 packs them together, and reads garbage when
# the scales stayed in the model. The smallest scales that occur are 32 floats; what is smaller are axes and shapes.
_MIN_EXTERNAL_BYTES: Final = 100
# The copy holds the weights as they were and packed: 2.3 times the size of a GPT-2 in int8.
_COPY_FACTOR: Final = 2.6
_ENDED: Final = "{source} is not used: packing it with onnxruntime {version} was ended by {signal}"
_KILLED_HINT: Final = (
    ", as the kernel does when memory runs out. Free memory, raise the control group's limit, or use a smaller bundle"
)
_CRASHED_HINT: Final = ". Export it again, or try another onnxruntime"
# linux/mman.h; the second is not in Python's mmap module, and kernels before 5.14 refuse it.
_MADV_HUGEPAGE: Final = 14
_MADV_POPULATE_READ: Final = 22


class _Seal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Written last: what the copy was made from, and the hashes of its files. Early ones say no ``digest``."""

    name: str
    target: str
    sha256: dict[str, str]
    digest: str = ""


class CopyInUse:
    """Keeps a prepared copy from being tidied away by any process, as long as this object is there.

    Args:
        model_file: what ``prepared_graph`` has returned.
    """

    def __init__(self, model_file: Path) -> None:
        # If it is gone, or cannot be locked, whoever loads it can do without.
        with contextlib.suppress(OSError):
            descriptor = os.open(model_file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_SH)


def prepared_dir(cache_dir: Path) -> Path:
    """Where copies live, each in a folder of its own."""
    return cache_dir / "prepared"


def prepared_graph(bundle: Bundle, target: str, cache_dir: Path) -> Path:
    """Path of the prepared model of one graph; builds it first if it is missing, stale or damaged.

    Building another one may tidy this one away, unless ``CopyInUse`` keeps it.

    Args:
        bundle: an opened bundle; the graph's own files are verified when a copy has to be built.
        target: which of its graphs.
        cache_dir: what ``prepared_dir`` is in.

    Raises:
        ProviderError: ONNX Runtime crashed or hung on this graph, or was killed, as it is when memory runs out. The
            same would happen to whatever process loads it: it must not be loaded at all.
        BundleError: the bundle's files are wrong, or the copy cannot be built; the message says why.
    """
    folder = prepared_dir(cache_dir) / _key(bundle, target)
    if folder.exists():
        if _intact(folder):
            with contextlib.suppress(OSError):  # a cache that can only be read
                os.utime(folder)  # the last one used is what is kept
            return folder / MODEL_FILE
        _log.warning("the prepared copy is damaged and is built again", extra={"path": str(folder)})
        shutil.rmtree(folder, ignore_errors=True)
    _build(bundle, target, folder)
    _remove_stale(folder, bundle.manifest.name, target)
    return folder / MODEL_FILE


def _key(bundle: Bundle, target: str) -> str:
    parts = (bundle.digest, target, ort.__version__, cpu_features())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _intact(folder: Path) -> bool:
    try:
        seal = msgspec.json.decode((folder / SEAL_FILE).read_bytes(), type=_Seal)
        return all(_hash(folder / name) == seal.sha256[name] for name in (MODEL_FILE, DATA_FILE))
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, KeyError):
        return False


def _build(bundle: Bundle, target: str, folder: Path) -> None:
    graph = bundle.manifest.graph(target)
    source = bundle.verified_path(graph.file)
    if graph.data_file is not None:
        bundle.verified_path(graph.data_file)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _check_space(folder.parent, bundle, graph)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=folder.parent) as temporary:
            built = Path(temporary) / "copy"
            built.mkdir()
            _run_build(source, built)
            hashes = {name: _sync(built / name) for name in (MODEL_FILE, DATA_FILE)}
            seal = built / SEAL_FILE
            seal.write_bytes(msgspec.json.encode(_Seal(bundle.manifest.name, target, hashes, bundle.digest)))
            _sync(seal)
            try:
                built.rename(folder)
            except OSError:
                if not _intact(folder):  # otherwise another process has just built the same
                    raise
            flush_to_disk(folder.parent)
    except OSError as error:
        raise BundleError(f"the prepared copy cannot be written to {folder.parent}: {error}") from None


def _run_build(source: Path, built: Path) -> None:
    """Write the copy of ``source`` into ``built`` in a process of its own: its memory for packing is gone afterwards.

    A crash in it is an error here. So that it stays one, the graph is then refused, not loaded as it is: that is the
    same code on the same file, and needs nearly the memory that packing does (without a copy the weights are packed
    at each load). It would end the daemon, with the bundle that it serves until now, or have it restarted for ever.
    A build that says why it failed, as on a full disk, is another matter.
    """
    command = [*child_command("edge_llm.bundle.prepare"), str(source.resolve()), str(built.resolve())]
    try:
        result = subprocess.run(
            command,
            cwd=CHILD_FOLDER,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=BUILD_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ProviderError(f"{source} is not used: packing it did not end within {BUILD_TIMEOUT_S} s") from None
    if result.returncode < 0:
        ended = _ENDED.format(source=source, version=ort.__version__, signal=signal_name(-result.returncode))
        raise ProviderError(ended + (_KILLED_HINT if result.returncode == -signal.SIGKILL else _CRASHED_HINT))
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        raise BundleError(f"the prepared copy of {source} could not be built: {lines[-1]}")


def _check_space(folder: Path, bundle: Bundle, graph: Graph) -> None:
    needed = int(bundle.entry(graph.data_file or graph.file).size_bytes * _COPY_FACTOR) + (1 << 20)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BundleError(
            f"no space for the prepared copy in {folder}: it needs {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free"
        )


def _sync(path: Path) -> str:
    """Flush a file to the disk; returns its SHA-256."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        if hasattr(os, "posix_fadvise"):
            # What was just written lies in small pages; the hash reads it anew, into large ones.
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return _hash(path)


def _hash(path: Path) -> str:
    """SHA-256 of a file that is mapped afterwards: on the way it comes into the page cache in huge pages, if it can.

    Weights in huge pages mean fewer misses of the TLB at every step. A failure to read is left to the hash, as an
    ``OSError``: through a mapping it would be a signal, which ends the process.
    """
    with (
        contextlib.suppress(OSError, ValueError),  # an old kernel; an empty file
        path.open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapping,
    ):
        mapping.madvise(_MADV_HUGEPAGE)
        mapping.madvise(_MADV_POPULATE_READ)
    return sha256_file(path)


def _remove_stale(keep: Path, name: str, target: str) -> None:
    """Delete old copies of the same bundle and target but one, and what a killed build left behind.

    The one is in use, or kept for going back to the previous bundle or onnxruntime.
    """
    others: list[tuple[float, Path]] = []
    for folder in keep.parent.iterdir():
        # Another daemon may be tidying up here, too.
        with contextlib.suppress(OSError, msgspec.MsgspecError, UnicodeDecodeError):
            if folder == keep:
                continue
            used_at = folder.stat().st_mtime
            if folder.name.startswith(".building-"):
                if time.time() - used_at > BUILD_TIMEOUT_S:  # no build that old is still running
                    shutil.rmtree(folder, ignore_errors=True)
                continue
            seal = msgspec.json.decode((folder / SEAL_FILE).read_bytes(), type=_Seal)
            if (seal.name, seal.target) == (name, target):
                others.append((used_at, folder))
    in_use = False
    for number, (_, folder) in enumerate(sorted(others), 1):
        if number < len(others) or in_use:
            with contextlib.suppress(OSError):
                in_use |= not _remove_unused(folder)


def remove_copies(folder: Path, digest: str) -> int:
    """Delete the copies of a bundle but those in use; returns how many.

    Args:
        folder: ``prepared_dir``; need not exist.
        digest: of the bundle.

    Raises:
        OSError: the folder cannot be read, or a copy not be deleted.
    """
    removed = 0
    for copy in sorted(folder.iterdir()) if folder.is_dir() else ():
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, msgspec.MsgspecError, UnicodeDecodeError):
            seal = msgspec.json.decode((copy / SEAL_FILE).read_bytes(), type=_Seal)
            if seal.digest == digest:
                removed += _remove_unused(copy)
    return removed


def _remove_unused(folder: Path) -> bool:
    """Delete a copy, unless a process uses it: then False. Raises ``OSError``."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _write_copy(source: Path, folder: Path) -> None:
    """Load ``source`` and let ONNX Runtime write its optimised form with packed weights."""
    options = session_options(threads=0)
    options.optimized_model_filepath = str(folder / MODEL_FILE)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", DATA_FILE)
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_min_size_in_bytes", str(_MIN_EXTERNAL_BYTES)
    )
    options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    make_session(source, options)
    if not (folder / DATA_FILE).exists():
        (folder / DATA_FILE).touch()  # a graph whose every initializer is small


if __name__ == "__main__":
    end_first_without_memory()
    _write_copy(Path(sys.argv[1]), Path(sys.argv[2]))
