"""A bundle's health prompt in a process of its own: one that crashes, hangs or fills the memory harms nobody else.

python -m edge_llm.engine.probe < {"folder", "config"}
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from edge_llm import errors
from edge_llm.bundle.manifest import Bundle
from edge_llm.config import Config
from edge_llm.engine.loading import load_model
from edge_llm.errors import BundleError, BundleHealthError, ConfigError, EdgeLlmError, MemoryPlanError
from edge_llm.logs import configure_logging

if TYPE_CHECKING:
    from edge_llm.bundle.store import BundleStore

_FAILED_STATUS: Final = 3
# What it may say to us; a message names a file or two.
_MAX_REPORT_BYTES: Final = 1 << 16


class _Request(msgspec.Struct, frozen=True):
    folder: str
    config: Config


class _Report(msgspec.Struct, frozen=True):
    """Why it failed: the class of the error, and its message."""

    error: str
    message: str


def check_installed(store: BundleStore, digest: str, config: Config) -> Bundle:
    """See that an installed bundle is what was installed, and answers its health prompt here.

    Args:
        store: where it is.
        digest: which.
        config: with the keys, the engine's settings, and the time limit.

    Raises:
        MemoryPlanError: there is no memory for it beside what runs now.
        BundleError, ConfigError: it cannot be served.
    """
    bundle = store.open(digest, config.bundle_keys)
    bundle.verify()
    probe(bundle.path, config)
    return bundle


def probe(folder: Path, config: Config) -> None:
    """Load a bundle elsewhere, as ``config`` says but with a single slot, and have it answer its expectation.

    The device-local copy is prepared on the way, and is there afterwards.

    Raises:
        BundleHealthError: it ends its process, or takes longer than ``activation_timeout_s``.
        MemoryPlanError, BundleError, ConfigError: as ``load_model`` does.
    """
    small = msgspec.structs.replace(
        config,
        engine=msgspec.structs.replace(config.engine, slots=1),
        cache=msgspec.structs.replace(config.cache, prefix=False),
    )
    request = msgspec.json.encode(_Request(str(folder), small))
    process = subprocess.Popen(
        [sys.executable, "-m", "edge_llm.engine.probe"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        raw, _ = process.communicate(request, config.activation_timeout_s)
    except subprocess.TimeoutExpired:
        raise BundleHealthError(
            f"it did not answer its health prompt within activation_timeout_s = {config.activation_timeout_s:g} s"
        ) from None
    finally:
        _end(process)
    if process.returncode == 0:
        return
    raise _error_of(process.returncode, raw)


def _end(process: subprocess.Popen[bytes]) -> None:
    """With what it has started: a copy may be being built."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _error_of(status: int, raw: bytes) -> EdgeLlmError:
    """The error that the child met, as one of ours."""
    if status == _FAILED_STATUS:
        with contextlib.suppress(msgspec.MsgspecError):
            report = msgspec.json.decode(raw[-_MAX_REPORT_BYTES:], type=_Report)
            kind = getattr(errors, report.error, None)
            known = isinstance(kind, type) and issubclass(kind, (BundleError, ConfigError, MemoryPlanError))
            return kind(report.message) if known and kind is not None else BundleHealthError(report.message)
    what = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    return BundleHealthError(f"loading it ends the process ({what})")


def main() -> int:
    """The child's part."""
    configure_logging("error", "text")
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=_Request)
    try:
        # Its signature was checked by who asks.
        load_model(Bundle.open(request.folder), request.config)
    except Exception as error:
        sys.stdout.buffer.write(msgspec.json.encode(_Report(type(error).__name__, str(error))))
        return _FAILED_STATUS
    return 0


if __name__ == "__main__":
    sys.exit(main())
