"""The files that make edge-llm a service of a machine: planned first, then written, and removed without a trace.

What was written is recorded with its hash in ``install.json``, so that exactly that can be removed later, and nothing
that was changed since.
"""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from edge_llm.bundle.files import replace_file
from edge_llm.errors import ConfigError
from edge_llm.unit_files import GPU_DROP_IN, UNIT, drop_in_text, unit_text, uses_gpu

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edge_llm.unit_files import Machine

CONFIG_FILE: Final = Path("/etc/edge-llm/config.toml")
RECORD_FILE: Final = Path("/etc/edge-llm/install.json")
UNIT_FILE: Final = Path("/etc/systemd/system") / UNIT
MACHINE_DROP_IN_FILE: Final = Path(f"{UNIT_FILE}.d/10-machine.conf")
GPU_DROP_IN_FILE: Final = Path(f"{UNIT_FILE}.d/20-gpu.conf")
_FILE_MODE: Final = 0o644
_FOLDER_MODE: Final = 0o755
_SYSTEMCTL_TIMEOUT_S: Final = 90


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """SHA-256 of each file as it was written, by its path on the machine."""

    written: dict[str, str]


@dataclass(frozen=True)
class Step:
    """One thing that will be done.

    Attributes:
        verb: write, replace, keep, remove or run.
        what: a path on the machine, or a command.
        remark: what the reader should know.
        content: what is written.
        keeps_old: whether what was there stays beside it.
    """

    verb: str
    what: str
    remark: str = ""
    content: str = ""
    keeps_old: bool = False

    def __str__(self) -> str:
        return f"  {self.verb:<8} {self.what}{f'  ({self.remark})' if self.remark else ''}"


class Installation:
    """The files of one machine.

    Args:
        root: where the machine's ``/`` is; another folder for an image. Then systemd is not told.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._record = self._read_record()

    def below_root(self, path: Path) -> Path:
        """Where a path of the machine lies here."""
        return self._root / path.relative_to("/")

    @property
    def groups(self) -> frozenset[str]:
        """The names of the machine's groups."""
        try:
            lines = self.below_root(Path("/etc/group")).read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return frozenset()
        return frozenset(line.partition(":")[0] for line in lines)

    @property
    def has_config(self) -> bool:
        """Whether the machine has a config file already."""
        return self.below_root(CONFIG_FILE).exists()

    def plan_install(self, machine: Machine, config_text: str) -> list[Step]:
        """What an installation would do.

        Args:
            machine: what the drop-in is for.
            config_text: the config file, if there is none yet.
        """
        files = {UNIT_FILE: unit_text(UNIT), MACHINE_DROP_IN_FILE: drop_in_text(machine)}
        if uses_gpu(machine.config):
            files[GPU_DROP_IN_FILE] = unit_text(GPU_DROP_IN)
        steps = [Step("keep", str(CONFIG_FILE), "it is yours")]
        if not self.has_config:
            steps = [Step("write", str(CONFIG_FILE), content=config_text)]
        steps += [self._plan_file(path, content) for path, content in files.items()]
        steps += [
            Step("remove", path, "no longer needed")
            for path in self._record.written
            if Path(path) not in (*files, CONFIG_FILE) and not self._is_changed(path)
        ]
        return [*steps, *self._told("systemctl daemon-reload")]

    def plan_uninstall(self) -> list[Step]:
        """What an uninstallation would do. Raises ``ConfigError`` if nothing has been installed."""
        if not self._record.written:
            raise ConfigError(f"nothing to uninstall: there is no {self.below_root(RECORD_FILE)}")
        steps = self._told(f"systemctl disable --now {UNIT}")
        for path in self._record.written:
            changed = self._is_changed(path)
            if changed is None:
                continue
            steps.append(Step("keep", path, "it was changed since") if changed else Step("remove", path))
        if self.has_config and str(CONFIG_FILE) not in self._record.written:
            steps.append(Step("keep", str(CONFIG_FILE), "it is yours"))
        return [*steps, *self._told("systemctl daemon-reload")]

    def apply(self, steps: list[Step]) -> Iterator[str]:
        """Carry a plan out, and yield a line for each step that could not be done.

        Raises:
            ConfigError: a file cannot be written or removed.
        """
        removed = {step.what for step in steps if step.verb == "remove"}
        written = {step.what: step.content for step in steps if step.verb in ("write", "replace")}
        hashes = {path: _sha256(content.encode()) for path, content in written.items()}
        try:
            # First, so that a cut in the middle leaves nothing that the record does not know.
            self._write_record({**self._record.written, **hashes})
            for step in steps:
                if (trouble := self._do(step)) is not None:
                    yield trouble
            self._write_record({path: digest for path, digest in self._record.written.items() if path not in removed})
        except OSError as error:
            raise ConfigError(f"cannot write {error.filename}: {error.strerror}") from None

    def forget(self) -> None:
        """Remove the record, and the folders that are empty now: what is left belongs to the user."""
        self.below_root(RECORD_FILE).unlink(missing_ok=True)
        for folder in (MACHINE_DROP_IN_FILE.parent, CONFIG_FILE.parent):
            with contextlib.suppress(OSError):
                self.below_root(folder).rmdir()

    def _plan_file(self, path: Path, content: str) -> Step:
        name = str(path)
        here = self.below_root(path)
        if not here.exists():
            return Step("write", name, content=content)
        if here.read_bytes() == content.encode():
            return Step("write", name, "as it is", content)
        if self._is_changed(name):
            return Step("replace", name, f"not as we wrote it: kept as {name}.old", content, keeps_old=True)
        return Step("replace", name, content=content)

    def _is_changed(self, path: str) -> bool | None:
        """Whether a file is another one than was written; None if it is gone."""
        try:
            return _sha256(self.below_root(Path(path)).read_bytes()) != self._record.written.get(path)
        except FileNotFoundError:
            return None

    def _do(self, step: Step) -> str | None:
        here = self.below_root(Path(step.what)) if step.verb != "run" else self._root
        if step.verb == "run":
            return _run(step.what)
        if step.verb == "remove":
            here.unlink(missing_ok=True)
        elif step.verb in ("write", "replace"):
            _make_folder(here.parent)
            if step.keeps_old:
                here.replace(f"{here}.old")
            replace_file(here, step.content.encode())
            here.chmod(_FILE_MODE)
        return None

    def _told(self, command: str) -> list[Step]:
        """systemd is told only on the machine itself, and where it runs."""
        runs = self._root == Path("/") and Path("/run/systemd/system").is_dir()
        return [Step("run", command)] if runs else []

    def _read_record(self) -> _Record:
        path = self.below_root(RECORD_FILE)
        try:
            return msgspec.json.decode(path.read_bytes(), type=_Record)
        except FileNotFoundError:
            return _Record({})
        except (OSError, msgspec.MsgspecError) as error:
            raise ConfigError(f"{path}, which says what was installed, cannot be read: {error}") from None

    def _write_record(self, written: dict[str, str]) -> None:
        here = self.below_root(RECORD_FILE)
        _make_folder(here.parent)
        self._record = _Record(written)
        replace_file(here, msgspec.json.format(msgspec.json.encode(self._record)) + b"\n")


def _make_folder(folder: Path) -> None:
    """With its parents, readable by the daemon's user whatever root's umask is. Raises ``OSError``."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir()
        folder.chmod(_FOLDER_MODE)


def _run(command: str) -> str | None:
    try:
        done = subprocess.run(
            command.split(), capture_output=True, text=True, timeout=_SYSTEMCTL_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"`{command}` failed: {error}"
    return f"`{command}` failed: {done.stderr.strip()}" if done.returncode else None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
