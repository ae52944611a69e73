"""How ``edge-llm forget`` reaches what running daemons hold in memory: a line in a file that they look at.

The file is under the state folder, and written whether or not anything else is kept there. A line names a user by a
salted hash, since the name is to be forgotten, too. Who deletes the folder itself wants everybody to be forgotten.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from edge_llm.cache.state_file import FileIdentity, file_identity

if TYPE_CHECKING:
    from pathlib import Path

_log = logging.getLogger(__name__)

ERASURE_FILE: Final = "erasures"
# Daemons look every second, so older lines are of no use.
_MAX_BYTES: Final = 16_384
_SALT_BYTES: Final = 16
_DIGEST_BYTES: Final = 16
_EVERYBODY: Final = "everybody"


@dataclass(frozen=True)
class Erasure:
    """Whose words are to be forgotten. ``digest`` is of the user's name with ``salt``; None for everybody."""

    salt: bytes = b""
    digest: bytes | None = None

    def concerns(self, user: str) -> bool:
        """Whether this user's words are among them."""
        return self.digest is None or secrets.compare_digest(_digest(user, self.salt), self.digest)


EVERYBODY: Final = Erasure()


def announce_erasure(folder: Path, user: str | None) -> None:
    """Tell every daemon that keeps its state in ``folder`` to forget a user, or everybody. Does not wait for them.

    Raises:
        OSError: the file cannot be written.
    """
    if not folder.is_dir():
        return  # no daemon has run with it
    if user is None:
        line = f"{_EVERYBODY}\n"
    else:
        salt = secrets.token_bytes(_SALT_BYTES)
        line = f"{salt.hex()} {_digest(user, salt).hex()}\n"
    path = folder / ERASURE_FILE
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        if os.geteuid() == 0:
            # As under sudo: the daemon must be able to read it, and the folder is the daemon's.
            owner = folder.stat()
            os.fchown(descriptor, owner.st_uid, owner.st_gid)
        if os.fstat(descriptor).st_size > _MAX_BYTES - 128:
            os.ftruncate(descriptor, 0)
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


class _Held(NamedTuple):
    """A folder that is kept open, so that no other one gets its number."""

    descriptor: int
    identity: FileIdentity


class ErasureNotices:
    """Reads what was announced since it was made. Not thread-safe.

    Args:
        folder: the state folder. It is made again where it is missing: without it nothing could be announced.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / ERASURE_FILE
        self._held = _hold(folder)
        self._signature = self._stat()
        self._seen = len(self._read())

    def poll(self) -> list[Erasure]:
        """What has been announced since the last call; in doubt, everybody."""
        if self._is_another_folder():
            self._signature, self._seen = self._stat(), len(self._read())
            return [EVERYBODY]
        signature = self._stat()
        if signature == self._signature:
            return []
        raw = self._read()
        start = self._seen if len(raw) >= self._seen else 0
        self._signature, self._seen = signature, len(raw)
        return [_parse(line) for line in raw[start:].splitlines()]

    def _is_another_folder(self) -> bool:
        """Whether the folder of the last call is gone: what was announced in it since then is lost, too."""
        before = self._held
        if before is not None and file_identity(self._folder) == before.identity:
            return False
        with contextlib.suppress(OSError):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._held = _hold(self._folder)
        if before is None:
            return False
        os.close(before.descriptor)
        return True

    def _stat(self) -> tuple[int, int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns

    def _read(self) -> bytes:
        try:
            with self._path.open("rb") as stream:
                return stream.read(_MAX_BYTES)
        except FileNotFoundError:
            return b""
        except OSError as error:
            _log.warning("what is to be forgotten cannot be read: %s", error)
            return b""


def _hold(folder: Path) -> _Held | None:
    """None if it is not there."""
    try:
        descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    status = os.fstat(descriptor)
    return _Held(descriptor, (status.st_dev, status.st_ino))


def _digest(user: str, salt: bytes) -> bytes:
    return hashlib.blake2b(user.encode("utf-8", "surrogatepass"), key=salt, digest_size=_DIGEST_BYTES).digest()


def _parse(line: bytes) -> Erasure:
    """One line; one that is damaged might have been anybody."""
    salt, _, digest = line.decode("ascii", "replace").partition(" ")
    try:
        erasure = Erasure(bytes.fromhex(salt), bytes.fromhex(digest))
    except ValueError:
        return EVERYBODY
    is_whole = len(erasure.salt) == _SALT_BYTES and len(erasure.digest or b"") == _DIGEST_BYTES
    return erasure if is_whole else EVERYBODY
