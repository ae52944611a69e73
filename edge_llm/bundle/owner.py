"""Acting as the owner of the bundle store, or of another folder of the daemon's user.

What root wrote there the daemon could not read, and what the daemon may have put in root's way must harm nobody. So
root goes into the folder, which may lie below one that only root can enter (/var/lib/private, with DynamicUser=), and
a process that gives up root for good does the work from there.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from typing import TYPE_CHECKING, Literal

import msgspec

from edge_llm.bundle.store import BundleStore
from edge_llm.config import bundle_store_dir
from edge_llm.device.child import how_it_ended
from edge_llm.errors import BundleError, ConfigError, EdgeLlmError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from edge_llm.config import Config

    # Takes the folder, and whether it is another user's than who has run the command; yields lines for people.
    FolderWork = Callable[[Path, bool], Iterator[str]]
    # The same with the store.
    Work = Callable[[BundleStore, bool], Iterator[str]]


class _Message(msgspec.Struct, frozen=True):
    """What the process that does the work tells; the last one is not ``said``."""

    kind: Literal["said", "done", "bundle", "settings"]
    text: str = ""


def as_owner(config: Config, work: Work) -> Iterator[str]:
    """Do ``work`` as the owner of the store, or of the folder that it will be in; only root has to change for that.

    Where root does, the store's folder is relative and all other paths that ``work`` uses have to be absolute.

    Yields:
        What ``work`` does.

    Raises:
        BundleError: ``work`` did.
        ConfigError: ``work`` did, or the store is a link, or cannot be reached.
    """
    folder = bundle_store_dir(config).absolute()
    # The daemon's user can put what he likes below the state folder, so by default that says who he is.
    owners = (folder,) if config.bundle_store is not None else (folder.parent, folder)
    yield from in_folder_as_owner(
        "the bundle store", folder, owners, lambda path, is_anothers: work(BundleStore(path), is_anothers)
    )


def in_folder_as_owner(what: str, folder: Path, owners: Sequence[Path], work: FolderWork) -> Iterator[str]:
    """Do ``work`` in a folder as its owner, as ``as_owner`` does in the store's.

    Args:
        what: the folder is, for people.
        folder: absolute; need not exist.
        owners: folders to ask for the owner, the first that is not root's; one that is not there is its parent.
        work: gets a relative path where root acts as somebody else.

    Yields and raises as ``as_owner``.
    """
    _refuse_link(what, folder)
    if os.geteuid() != 0:
        yield from work(folder, False)
        return
    anchor, descriptor = _open_anchor(what, folder, owners)
    try:
        if os.fstat(descriptor).st_uid == 0:
            yield from work(folder, False)
        else:
            yield from _in_child(what, descriptor, folder.relative_to(anchor), work)
    finally:
        os.close(descriptor)


def _refuse_link(what: str, folder: Path) -> None:
    try:
        is_link = folder.is_symlink()
    except OSError as error:
        raise ConfigError(f"{what} {folder} cannot be read: {error.strerror}; use sudo") from None
    if is_link:
        raise ConfigError(f"{what} {folder} is a link: name the folder itself in the settings")


def _open_anchor(what: str, folder: Path, owners: Sequence[Path]) -> tuple[Path, int]:
    """The folder whose owner is acted as, and a descriptor of it."""
    anchor, descriptor = folder, -1
    for start in owners:
        if descriptor >= 0:
            os.close(descriptor)
        anchor = next(path for path in (start, *start.parents) if path.exists())
        # /var/lib/edge-llm is a link that systemd made; the folder itself must be none, now either.
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (os.O_NOFOLLOW if anchor == folder else 0)
        try:
            descriptor = os.open(anchor, flags)
        except OSError as error:
            raise ConfigError(f"{what} {folder} cannot be used: {error}") from None
        if os.fstat(descriptor).st_uid != 0:
            break
    return anchor, descriptor


def _in_child(what: str, descriptor: int, path: Path, work: FolderWork) -> Iterator[str]:
    """Do ``work`` in a process that is the owner of the folder ``descriptor``, and in it; ``path`` is from there."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reading)
            _become_owner(descriptor)
            _tell(writing, work(path, True))
            status = 0
        except (KeyboardInterrupt, BrokenPipeError):
            pass  # whoever has started us knows
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    last, ended = None, False
    # Whatever ends this process ends the other one as well: it may hold the store's locks.
    before = signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        with open(reading, "rb") as stream, contextlib.suppress(msgspec.MsgspecError):
            for raw in stream:
                last = msgspec.json.decode(raw, type=_Message)
                if last.kind == "said":
                    yield last.text
            ended = True
    finally:
        if not ended:
            os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        signal.signal(signal.SIGTERM, before)
    _check_end(what, last, os.waitstatus_to_exitcode(status))


def _become_owner(descriptor: int) -> None:
    """Go into the folder, and be its owner from now on: there is no way back to root."""
    owner = os.fstat(descriptor)
    os.fchdir(descriptor)
    os.setgroups([])
    os.setresgid(owner.st_gid, owner.st_gid, owner.st_gid)
    os.setresuid(owner.st_uid, owner.st_uid, owner.st_uid)


def _tell(writing: int, lines: Iterator[str]) -> None:
    with open(writing, "wb", buffering=0) as stream:

        def send(message: _Message) -> None:
            stream.write(msgspec.json.encode(message) + b"\n")

        try:
            for line in lines:
                send(_Message("said", line))
            send(_Message("done"))
        except BundleError as error:
            send(_Message("bundle", str(error)))
        except EdgeLlmError as error:
            send(_Message("settings", str(error)))


def _check_end(what: str, last: _Message | None, status: int) -> None:
    """Raise what the process has told; that it ended well is believed only if it said so."""
    if last is not None and last.kind == "bundle":
        raise BundleError(last.text)
    if last is not None and last.kind == "settings":
        raise ConfigError(last.text)
    if last is None or last.kind != "done" or status != 0:
        how = how_it_ended(status)
        raise ConfigError(f"the process that worked on {what} ended before it was done ({how})")
