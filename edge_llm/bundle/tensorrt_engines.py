"""The engines that TensorRT compiles of a graph for this very GPU: built ahead, in a process of its own, and kept.

A build takes minutes. In a process of its own a crash of the builder ends nothing else, its memory is gone afterwards,
and whoever waits can be told how far it is. The daemon's own session then finds the engines and compiles nothing.

They are kept like prepared copies (edge_llm/bundle/prepare.py): keyed by what they depend on, sealed when they are
complete, and checked by hash at every start. One process at a time builds and removes them: another one, such as
``edge-llm doctor`` beside the daemon, waits and takes what was built. The provider's options used here are those of
https://onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.html. Never run on hardware.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

import msgspec
import onnxruntime as ort

from edge_llm.bundle.files import replace_file
from edge_llm.bundle.manifest import sha256_file
from edge_llm.bundle.prepare import BUILD_TIMEOUT_S
from edge_llm.device.child import CHILD_FOLDER, child_command, end_first_without_memory
from edge_llm.device.session import TENSORRT, Provider, make_session, session_options
from edge_llm.device.sysfs import read_text
from edge_llm.errors import ConfigError, EdgeLlmError, ProviderError

if TYPE_CHECKING:
    from edge_llm.bundle.manifest import Bundle, Graph

_log = logging.getLogger(__name__)

ENGINE_PATTERN: Final = "*.engine"
SEAL_FILE: Final = "engines.json"
LOCK_FILE: Final = "lock"
# How often it is told how far a build is.
PROGRESS_S: Final = 5.0
_FAILED_STATUS: Final = 3
_COMMAND: Final = tuple(child_command("edge_llm.bundle.tensorrt_engines"))
# These follow from the settings' cache_dir.
_OWN_PATHS: Final = ("trt_engine_cache_path", "trt_timing_cache_path", "trt_ep_context_file_path")
_DUMP_CONTEXT: Final = "trt_dump_ep_context_model"
_PREFIX: Final = "trt_engine_cache_prefix"
# Below _ROOT: which board it is, its release of Jetson Linux, and the GPU's driver. Each machine has some of them.
_ROOT = Path("/")
_MACHINE_FILES: Final = ("proc/device-tree/compatible", "etc/nv_tegra_release", "proc/driver/nvidia/version")


class Progress(NamedTuple):
    """How far a build is.

    Attributes:
        elapsed_s: since it began.
        engines: that are there.
        graphs: of each of which one engine is made, if TensorRT takes it as a whole.
    """

    elapsed_s: float
    engines: int
    graphs: int


OnProgress: TypeAlias = Callable[[Progress], None]


class _Request(msgspec.Struct, frozen=True):
    """What the building process is asked for."""

    graphs: list[str]
    options: dict[str, str]


class _Seal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Written last: SHA-256 of each engine, by the name of its file."""

    name: str
    target: str
    sha256: dict[str, str]


class TensorrtEngines:
    """The engines of one graph of a bundle, which are two of a static form.

    Args:
        bundle: an opened bundle, whose files have been verified.
        graph: one of its graphs.
        provider: TensorRT with the options of the settings. Engines and timings are kept unless these say otherwise.
        cache_dir: where engines live; those of each graph and set of options have a folder of their own.

    Attributes:
        provider: the same with its paths, for the session that is to find what is kept.

    Raises:
        ConfigError: the options name a path, or ask for what would not be used.
    """

    def __init__(self, bundle: Bundle, graph: Graph, provider: Provider, cache_dir: Path) -> None:
        _check_options(provider)
        options = {"trt_engine_cache_enable": "1", "trt_timing_cache_enable": "1", **provider.options}
        self._folder = cache_dir / "tensorrt" / _key(bundle, graph, options)
        self._names = (bundle.manifest.name, graph.target)
        # What else there is, is a data file, which lies beside them.
        graphs = (graph.file,) if graph.prefill_file is None else (graph.file, graph.prefill_file)
        self._graphs = [bundle.path / name for name in graphs]
        self._kept = _is_on(options, "trt_engine_cache_enable")
        options["trt_timing_cache_path"] = str(self._folder)
        options["trt_engine_cache_path"] = str(self._folder)
        self.provider = Provider(provider.name, options)
        # When the seal was written of what was found whole, and of what is not to be used again.
        self._found_ns: int | None = None
        self._discarded_ns: int | None = None

    def prepare(self, on_progress: OnProgress) -> bool:
        """See that the engines are there and whole. True if they have been built just now.

        Args:
            on_progress: told before a build begins, which it may prevent by a ``ProviderError``, and every few seconds
                until it ends.

        Raises:
            ProviderError: they cannot be built; the message says why.
        """
        if not self._kept or self._intact():
            return False
        try:
            with self._locked(on_progress):
                if self._intact():  # another process has just built the same
                    return False
                self._build_anew(on_progress)
        except OSError as error:
            raise ProviderError(f"engines cannot be kept in {self._folder}: {error.strerror}") from None
        return True

    def discard(self) -> bool:
        """Have what was found built anew by the next ``prepare``. False if nothing was.

        It is not removed before: another process may already have built it anew.
        """
        self._discarded_ns = self._found_ns
        return self._found_ns is not None

    @contextlib.contextmanager
    def _locked(self, on_progress: OnProgress) -> Iterator[None]:
        """Build alone under this cache folder; tells how far it is while another process builds. Raises ``OSError``."""
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        with (self._folder.parent / LOCK_FILE).open("ab") as lock:
            while True:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                self._tell(on_progress, started)
                time.sleep(PROGRESS_S)
            yield

    def _build_anew(self, on_progress: OnProgress) -> None:
        # Before anything is removed: whoever is told may refuse.
        on_progress(Progress(0.0, 0, len(self._graphs)))
        shutil.rmtree(self._folder, ignore_errors=True)
        _log.info("building TensorRT engines, which takes minutes", extra={"path": str(self._folder)})
        started = time.monotonic()
        try:
            self._folder.mkdir()
            self._build(on_progress)
            self._seal()
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        _log.info("TensorRT engines are built", extra={"build_s": round(time.monotonic() - started, 1)})

    def _intact(self) -> bool:
        try:
            sealed_ns = (self._folder / SEAL_FILE).stat().st_mtime_ns
            seal = msgspec.json.decode((self._folder / SEAL_FILE).read_bytes(), type=_Seal)
            whole = all(sha256_file(self._folder / name) == digest for name, digest in seal.sha256.items())
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            return False
        if not whole or sealed_ns == self._discarded_ns:
            return False
        self._found_ns = sealed_ns
        return True

    def _seal(self) -> None:
        hashes = {path.name: sha256_file(path) for path in self._folder.glob(ENGINE_PATTERN)}
        # None of them, if the provider's library could not be loaded: the session that follows says so.
        if hashes:
            replace_file(self._folder / SEAL_FILE, msgspec.json.encode(_Seal(*self._names, hashes)))
            self._remove_stale()

    def _remove_stale(self) -> None:
        """Delete old engines of the same bundle and target but one, which is kept for going back to it."""
        others = []
        for folder in self._folder.parent.iterdir():
            # Another daemon may be tidying up here, too.
            with contextlib.suppress(OSError, msgspec.MsgspecError, UnicodeDecodeError):
                seal = msgspec.json.decode((folder / SEAL_FILE).read_bytes(), type=_Seal)
                if folder != self._folder and (seal.name, seal.target) == self._names:
                    others.append((folder.stat().st_mtime, folder))
        for _, folder in sorted(others)[:-1]:
            shutil.rmtree(folder, ignore_errors=True)

    def _build(self, on_progress: OnProgress) -> None:
        """Have the sessions made in another process. Raises ``ProviderError`` with its reason."""
        graphs = [str(path.resolve()) for path in self._graphs]
        request: bytes | None = msgspec.json.encode(_Request(graphs, dict(self.provider.options)))
        limit_s = BUILD_TIMEOUT_S * len(graphs)
        started = time.monotonic()
        pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
        with subprocess.Popen(_COMMAND, cwd=CHILD_FOLDER, stdin=pipe, stdout=nowhere, stderr=pipe) as process:
            try:
                while True:
                    if time.monotonic() - started > limit_s:
                        raise ProviderError(f"building its engines did not end within {limit_s} s")
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        _, errors = process.communicate(request, timeout=PROGRESS_S)
                        break
                    request = None  # it has been taken
                    self._tell(on_progress, started)
            finally:
                # A stop of the daemon does not wait for a build.
                process.kill()
        if process.returncode:
            raise ProviderError(f"its engines could not be built: {_reason(process.returncode, errors)}")

    def _tell(self, on_progress: OnProgress, started: float) -> None:
        engines = len(list(self._folder.glob(ENGINE_PATTERN)))
        on_progress(Progress(round(time.monotonic() - started, 1), engines, len(self._graphs)))


def _check_options(provider: Provider) -> None:
    for name in _OWN_PATHS:
        if name in provider.options:
            raise ConfigError(
                f"engine.provider_options.{TENSORRT}.{name}: leave it out, engines are kept under cache_dir"
            )
    if _is_on(provider.options, _DUMP_CONTEXT):
        raise ConfigError(
            f"engine.provider_options.{TENSORRT}.{_DUMP_CONTEXT}: leave it out, a context model would not be used: the "
            "engines that are kept are loaded with the bundle's own graph"
        )
    if Path(provider.options.get(_PREFIX, "")).name != provider.options.get(_PREFIX, ""):
        raise ConfigError(f"engine.provider_options.{TENSORRT}.{_PREFIX}: a name, not a path")


def _is_on(options: Mapping[str, str], name: str) -> bool:
    return options.get(name, "0") in ("1", "true", "True")


def _key(bundle: Bundle, graph: Graph, options: dict[str, str]) -> str:
    machine = (read_text(_ROOT / name) or "" for name in _MACHINE_FILES)
    settings = (f"{key}={options[key]}" for key in sorted(options))
    parts = (bundle.digest, graph.target, ort.__version__, *machine, *settings)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _reason(status: int, errors: bytes) -> str:
    lines = errors.decode(errors="replace").strip().splitlines()
    if status == _FAILED_STATUS and lines:
        return lines[-1]
    return f"the process ended with {f'signal {-status}' if status < 0 else f'exit status {status}'}"


def _make_sessions(graphs: Sequence[str], options: dict[str, str]) -> None:
    """The child's part: every session compiles the engine of its graph and leaves it where the options say."""
    for graph in graphs:
        make_session(Path(graph), session_options(threads=0), Provider(TENSORRT, options))


def main() -> int:
    """What the process does that is asked for on its standard input."""
    end_first_without_memory()
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=_Request)
    try:
        _make_sessions(request.graphs, request.options)
    except EdgeLlmError as error:
        os.write(2, f"{error}\n".encode())
        return _FAILED_STATUS
    return 0


if __name__ == "__main__":
    sys.exit(main())
