"""A bundle's health prompt in a process of its own: one that crashes, hangs or fills the memory harms nobody else.

python -m edge_llm.engine.probe < {"folder", "config"}
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Final

import msgspec

from edge_llm import errors
from edge_llm.bundle.downgrade import refuse_downgrade
from edge_llm.bundle.manifest import Bundle
from edge_llm.bundle.shipped import open_bundle
from edge_llm.config import Config, cache_dir
from edge_llm.device.child import CHILD_FOLDER, child_command, end_first_without_memory, how_it_ended
from edge_llm.engine.loading import load_model
from edge_llm.errors import BundleError, BundleHealthError, ConfigError, EdgeLlmError, MemoryPlanError
from edge_llm.logs import configure_logging

if TYPE_CHECKING:
    from pathlib import Path

    from edge_llm.bundle.store import BundleStore

_FAILED_STATUS: Final = 3
# What it may say to us; a message names a file or two.
_MAX_REPORT_BYTES: Final = 1 << 16


class _Request(msgspec.Struct, frozen=True):
    folder: str
    config: Config


class _Answer(msgspec.Struct, frozen=True):
    """Which bundle has answered its health prompt."""

    digest: str


class _Report(msgspec.Struct, frozen=True):
    """Why it failed: the class of the error, and its message."""

    error: str
    message: str


def check_bundle(store: BundleStore, digest: str | None, config: Config) -> Bundle:
    """See that a bundle is what was installed, may follow what was served, and answers its health prompt here.

    Args:
        store: where it is.
        digest: which; None is the one that comes with edge_llm.
        config: with the keys, the engine's settings, and the time limit.

    Raises:
        MemoryPlanError: there is no memory for it beside what runs now.
        BundleError, ConfigError: it cannot be served.
    """
    bundle = open_bundle(store, digest, config.bundle_keys)
    if config.bundle_downgrade == "refuse":
        refuse_downgrade(store, digest, bundle.manifest)
    bundle.verify()
    probe(bundle.path, config)
    return bundle


def probe(folder: Path, config: Config) -> None:
    """Load a bundle elsewhere, as ``config`` says but with a single slot, and have it answer its expectation.

    The device-local copy is prepared on the way, and is there afterwards.

    Raises:
        BundleHealthError: it ends its process, or takes longer than ``activation_timeout_s``.
        MemoryPlanError: the kernel ended the process, as it does when memory runs out; or as ``load_model`` does.
        BundleError, ConfigError: as ``load_model`` does.
    """
    digest = Bundle.open(folder).digest
    small = msgspec.structs.replace(
        config,
        cache_dir=str(cache_dir(config).absolute()),
        engine=msgspec.structs.replace(config.engine, slots=1),
        cache=msgspec.structs.replace(config.cache, prefix=False),
    )
    request = msgspec.json.encode(_Request(str(folder.absolute()), small))
    process = subprocess.Popen(
        child_command("edge_llm.engine.probe"),
        cwd=CHILD_FOLDER,
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
    if process.returncode != 0 or not _has_answered(raw, digest):
        raise _error_of(process.returncode, raw)


def _end(process: subprocess.Popen[bytes]) -> None:
    """With what it has started: a copy may be being built."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _has_answered(raw: bytes, digest: str) -> bool:
    """Whether the child says so: a status of 0 alone may come from anything that ends a process."""
    with contextlib.suppress(msgspec.MsgspecError):
        return msgspec.json.decode(raw[-_MAX_REPORT_BYTES:], type=_Answer).digest == digest
    return False


def _error_of(status: int, raw: bytes) -> EdgeLlmError:
    """The error that the child met, as one of ours."""
    if status == _FAILED_STATUS:
        with contextlib.suppress(msgspec.MsgspecError):
            report = msgspec.json.decode(raw[-_MAX_REPORT_BYTES:], type=_Report)
            kind = getattr(errors, report.error, None)
            known = isinstance(kind, type) and issubclass(kind, (BundleError, ConfigError, MemoryPlanError))
            return kind(report.message) if known and kind is not None else BundleHealthError(report.message)
    if status == -signal.SIGKILL:
        return MemoryPlanError(
            "loading it was ended by SIGKILL, as the kernel does when memory runs out: free memory, raise the control "
            "group's limit, or use a smaller bundle"
        )
    if status == 0:
        return BundleHealthError("its process ended without saying that it has answered its health prompt")
    return BundleHealthError(f"loading it ends the process ({how_it_ended(status)})")


def main() -> int:
    """The child's part."""
    end_first_without_memory()
    # Libraries print what they like; only the answer goes where it is waited for.
    answer = os.dup(1)
    os.dup2(2, 1)
    configure_logging("error", "text")
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=_Request)
    try:
        # Its signature was checked by who asks.
        bundle = Bundle.open(request.folder)
        load_model(bundle, request.config)
    except Exception as error:
        _write(answer, _Report(type(error).__name__, str(error)))
        return _FAILED_STATUS
    _write(answer, _Answer(bundle.digest))
    return 0


def _write(descriptor: int, message: _Answer | _Report) -> None:
    with open(descriptor, "wb") as stream:
        stream.write(msgspec.json.encode(message))


if __name__ == "__main__":
    sys.exit(main())
