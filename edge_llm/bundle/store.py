"""Bundles side by side, and which of them is served.

    STORE/<sha256 of its manifest>/     an installed bundle: whole, or not there
    STORE/selection.json                which is current, which was before, which is wanted, and how each did
    STORE/starts.json                   starts of the current one that have not come to READY
    STORE/.incoming-*                   what an installation that is going on, or was killed, has written
    STORE/.lock .install.lock .activate.lock .daemon.lock

Both files are replaced as a whole, so a reader finds the old one or the new one. Whoever changes one holds ``.lock``.
A command that installs or removes waits for ``.install.lock``; one that activates, or removes, has ``.activate.lock``
or fails. A daemon that follows the store holds ``.daemon.lock``, shared, as long as it lives.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import secrets
import shutil
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, TypeVar

import msgspec

from edge_llm.bundle.files import flush_to_disk, read_plain_file, replace_file
from edge_llm.bundle.manifest import MANIFEST_FILE, Bundle, Sha256
from edge_llm.errors import (
    BundleDowngradeError,
    BundleError,
    BundleHealthError,
    BundleIntegrityError,
    BundleNotFoundError,
    BundleSignatureError,
    ConfigError,
    ManifestError,
    MemoryPlanError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

_log = logging.getLogger(__name__)

SELECTION_FILE: Final = "selection.json"
STARTS_FILE: Final = "starts.json"
INCOMING_PREFIX: Final = ".incoming-"
INSTALL_LOCK: Final = ".install.lock"
ACTIVATE_LOCK: Final = ".activate.lock"
MAX_FAILED_STARTS: Final = 3
_SELECTION_LOCK: Final = ".lock"
_DAEMON_LOCK: Final = ".daemon.lock"
_MAX_FILE_BYTES: Final = 1 << 20
# Of one reason: the selection holds one for each bundle, and must not outgrow what is read of it.
_MAX_DETAIL_LENGTH: Final = 2000
_DIGEST_PATTERN: Final = re.compile("[0-9a-f]{64}")
# How a failure is counted; the first that fits.
_KINDS: Final[dict[type[Exception], str]] = {
    BundleSignatureError: "signature",
    BundleIntegrityError: "integrity",
    ManifestError: "manifest",
    BundleNotFoundError: "missing",
    BundleHealthError: "health",
    BundleDowngradeError: "downgrade",
    BundleError: "unsupported",
    MemoryPlanError: "memory",
    ConfigError: "settings",
}

Signature = tuple[int, int, int]
_Read = TypeVar("_Read", bound=msgspec.Struct)


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Frozen, and a field that the schema does not know is an error."""


class Health(_Strict, frozen=True):
    """How a bundle did when it was last tried. ``at`` is the device's clock, in UTC; ``kind`` is for counting."""

    ok: bool
    at: str
    kind: str = "ok"
    detail: str = "answered its health prompt"

    @classmethod
    def failed(cls, reason: Exception) -> Health:
        """With the words of an error."""
        kind = next((kind for error, kind in _KINDS.items() if isinstance(reason, error)), "internal")
        detail = str(reason)[:_MAX_DETAIL_LENGTH] or type(reason).__name__
        return cls(ok=False, at=now(), kind=kind, detail=detail)


class Wanted(_Strict, frozen=True):
    """What a running daemon is asked to switch to, None being the bundle that comes with edge_llm.

    ``request`` tells one request from the next.
    """

    digest: Sha256 | None
    request: str


class Selection(_Strict, frozen=True):
    """``selection.json``. Digests are of manifests.

    None in ``current`` is the bundle that comes with edge_llm, and so it is in ``previous`` beside a current one.
    """

    format: Literal[1] = 1
    current: Sha256 | None = None
    previous: Sha256 | None = None
    wanted: Wanted | None = None
    health: dict[Sha256, Health] = {}

    def with_health(self, digest: str | None, health: Health) -> Selection:
        """The same, knowing how an installed bundle did."""
        if digest is None:
            return self
        return msgspec.structs.replace(self, health={**self.health, digest: health})


class _Starts(_Strict, frozen=True):
    digest: Sha256
    count: int


class BundleStore:
    """One folder of bundles. Any number of processes may use it.

    Args:
        folder: need not exist yet; only what writes makes it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    # -- what there is ------------------------------------------------------------------------------------------------

    def digests(self) -> list[str]:
        """Of every bundle that is installed."""
        try:
            names = sorted(os.listdir(self.folder))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ConfigError(f"the bundle store {self.folder} cannot be read: {error.strerror}") from None
        return [name for name in names if _DIGEST_PATTERN.fullmatch(name) and (self.folder / name).is_dir()]

    def path(self, digest: str) -> Path:
        """Where a bundle lies, or would."""
        return self.folder / digest

    def open(self, digest: str, keys: Sequence[str | Path] = ()) -> Bundle:
        """An installed bundle, with its signature checked if there are keys; hashes are checked as files are read.

        Raises:
            BundleError: it is not there, or not what was installed.
            ConfigError: a key cannot be used.
        """
        bundle = Bundle.open(self.path(digest), keys)
        if bundle.digest != digest:
            raise BundleIntegrityError(f"{bundle.path / MANIFEST_FILE} was changed since it was installed")
        return bundle

    def find(self, name: str) -> str:
        """The digest of the one bundle that ``name`` means: its name, NAME@VERSION, or how its digest begins.

        Raises:
            BundleNotFoundError: none, or more than one.
        """
        found = [digest for digest in self.digests() if name in self._names(digest) or digest.startswith(name)]
        if len(found) == 1 and name:
            return found[0]
        if not found or not name:
            raise BundleNotFoundError(
                f"no bundle {name!r} in {self.folder}: `edge-llm bundle list` shows what there is"
            )
        several = ", ".join(digest[:12] for digest in found)
        raise BundleNotFoundError(f"{name!r} may be {several}: give more, as NAME@VERSION or the beginning of its hash")

    def _names(self, digest: str) -> tuple[str, ...]:
        try:
            manifest = Bundle.open(self.path(digest)).manifest
        except BundleError:
            return ()
        return manifest.name, f"{manifest.name}@{manifest.version}"

    # -- which one is served ------------------------------------------------------------------------------------------

    def selection(self) -> Selection:
        """What is selected. A damaged file counts as none, with a warning: a device must not fall silent over it."""
        return _read(self.folder / SELECTION_FILE, Selection) or Selection()

    def signature(self) -> Signature | None:
        """Changes whenever the selection does."""
        try:
            status = (self.folder / SELECTION_FILE).stat()
        except OSError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns

    def update(self, change: Callable[[Selection], Selection]) -> Selection:
        """Replace the selection by what ``change`` makes of it; returns that. Raises ``OSError``."""
        with self.locked(_SELECTION_LOCK):
            before = self.selection()
            after = change(before)
            if after != before:
                replace_file(self.folder / SELECTION_FILE, msgspec.json.encode(after))
            return after

    def want(self, digest: str | None) -> Wanted:
        """Ask the daemon that follows the store to switch. Raises ``OSError``."""
        wanted = Wanted(digest=digest, request=secrets.token_hex(8))
        self.update(lambda selection: msgspec.structs.replace(selection, wanted=wanted))
        return wanted

    def activated(self, digest: str | None) -> Selection:
        """A bundle has answered its health prompt, and is the current one from now on; None is the one that comes with
        edge_llm. Raises ``OSError``."""

        def change(selection: Selection) -> Selection:
            before = selection.previous if selection.current == digest else selection.current
            selection = selection.with_health(digest, Health(ok=True, at=now()))
            return msgspec.structs.replace(
                selection, current=digest, previous=before, wanted=_unless(selection.wanted, digest)
            )

        # A new start counts from nothing, however often an earlier activation of it has failed.
        self.end_start()
        return self.update(change)

    def refused(self, digest: str | None, health: Health) -> Selection:
        """A bundle was wanted and has failed: nothing is switched. Raises ``OSError``."""

        def change(selection: Selection) -> Selection:
            selection = selection.with_health(digest, health)
            return msgspec.structs.replace(selection, wanted=_unless(selection.wanted, digest))

        return self.update(change)

    def remove(self, digest: str) -> None:
        """Delete a bundle that is not in use.

        Raises:
            ConfigError: it is the current one, or about to be.
            OSError: it cannot be deleted.
        """

        def forget(selection: Selection) -> Selection:
            if digest == selection.current or (selection.wanted is not None and selection.wanted.digest == digest):
                raise ConfigError(f"{digest[:12]} is the current bundle: activate another one first")
            previous = None if selection.previous == digest else selection.previous
            health = {name: health for name, health in selection.health.items() if name != digest}
            return msgspec.structs.replace(selection, previous=previous, health=health)

        with self.locked(INSTALL_LOCK):
            self.clean()
            self.update(forget)
            # Out of the way in one step: half a bundle would be shown otherwise.
            leaving = self.folder / f"{INCOMING_PREFIX}{secrets.token_hex(8)}"
            self.path(digest).rename(leaving)
            flush_to_disk(self.folder)
            shutil.rmtree(leaving)

    def clean(self) -> int:
        """Delete what killed installations have left; returns how many. With ``INSTALL_LOCK`` held."""
        leftovers = list(self.folder.glob(f"{INCOMING_PREFIX}*"))
        for leftover in leftovers:
            shutil.rmtree(leftover, ignore_errors=True)
        return len(leftovers)

    # -- starting -----------------------------------------------------------------------------------------------------

    def begin_start(self) -> tuple[Selection, int]:
        """Count a start of the current bundle before it is loaded.

        Returns:
            What is selected, and how many starts of it before this one have not come to READY.

        Raises:
            OSError: the store cannot be written.
        """
        selection = self.selection()
        if selection.wanted is not None:
            # Asked of a daemon that has ended over it: not again by itself.
            ended = Health(
                ok=False, at=now(), kind="interrupted", detail="the daemon ended before it had switched to it"
            )
            selection = self.refused(selection.wanted.digest, ended)
        starts = _read(self.folder / STARTS_FILE, _Starts)
        count = starts.count if starts is not None and starts.digest == selection.current else 0
        if selection.current is not None:
            self.set_starts(selection.current, count + 1)
        return selection, count

    def set_starts(self, digest: str, count: int) -> None:
        """So many starts of the current bundle have not come to READY. Raises ``OSError``."""
        if count == 0:
            self.end_start()
            return
        content = msgspec.json.encode(_Starts(digest=digest, count=count))
        with self.locked(_SELECTION_LOCK):
            replace_file(self.folder / STARTS_FILE, content)

    def end_start(self) -> None:
        """The start has come to READY. Raises ``OSError``."""
        path = self.folder / STARTS_FILE
        if path.exists():
            path.unlink(missing_ok=True)
            flush_to_disk(self.folder)

    def roll_back(self, failed: Mapping[str, Health], to: str | None) -> Selection:
        """Another bundle serves instead of the current one, which failed, and is the current one from now on.

        Args:
            failed: why, by digest; if the current one is none of these, somebody was quicker, and nothing changes.
            to: what serves; None is the bundle that comes with edge_llm.

        Raises:
            OSError: the store cannot be written.
        """

        def change(selection: Selection) -> Selection:
            if selection.current not in failed:
                return selection
            health = {**selection.health, **failed}
            return msgspec.structs.replace(selection, current=to, previous=None, health=health)

        return self.update(change)

    # -- locks --------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def locked(self, name: str, *, wait: bool = True) -> Iterator[None]:
        """Hold one of the store's locks; makes the store if need be.

        Raises:
            BlockingIOError: another process holds it, and is not waited for.
            OSError: the store cannot be written.
        """
        descriptor = self._open_lock(name)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        finally:
            os.close(descriptor)

    def follow(self) -> int:
        """Say that this process follows the store, until it ends; the descriptor that says so. Raises ``OSError``."""
        descriptor = self._open_lock(_DAEMON_LOCK)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        return descriptor

    def is_followed(self) -> bool:
        """Whether a running daemon follows the store."""
        try:
            descriptor = os.open(self.folder / _DAEMON_LOCK, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def _open_lock(self, name: str) -> int:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def now() -> str:
    """The device's clock, in UTC, to the second."""
    return datetime.now(tz=timezone.utc).isoformat(timespec="seconds")


def _unless(wanted: Wanted | None, digest: str | None) -> Wanted | None:
    """What is still wanted once ``digest`` has been dealt with."""
    return None if wanted is None or wanted.digest == digest else wanted


def _read(path: Path, kind: type[_Read]) -> _Read | None:
    try:
        return msgspec.json.decode(read_plain_file(path, _MAX_FILE_BYTES), type=kind)
    except FileNotFoundError:
        return None
    except (OSError, BundleIntegrityError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        _log.warning("a file of the bundle store cannot be used: %s", error, extra={"path": str(path)})
        return None
