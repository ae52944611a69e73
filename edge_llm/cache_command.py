"""``edge-llm cache info|clear`` and ``forget``: what is kept of earlier work, and how to get rid of it.

They work while a daemon runs: within a second or two it has forgotten, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from edge_llm.cache.erasure import announce_erasure
from edge_llm.cache.feedback_log import clear_feedback, feedback_count
from edge_llm.cache.popularity import clear_popular, popular_counts
from edge_llm.cache.prefix_lint import Finding, clear_findings, stored_findings
from edge_llm.cache.response_cache import ResponseStats, clear_responses, response_stats
from edge_llm.cache.state_db import existing_state, state_path
from edge_llm.cache.state_file import state_files
from edge_llm.cache.store import SNAPSHOT_FOLDER
from edge_llm.config import cache_dir, state_dir
from edge_llm.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

    from edge_llm.config import Config

PARTS: Final = ("responses", "popular", "feedback", "prefixes")


@dataclass(frozen=True)
class Prefixes:
    """The snapshots of prompt prefixes on disk."""

    files: int
    nbytes: int


@dataclass(frozen=True)
class CacheInfo:
    """What is on disk. ``size_bytes`` is of the state file alone; ``popular`` counts queries by user."""

    path: str
    size_bytes: int
    responses: ResponseStats
    popular: dict[str, int]
    findings: list[Finding]
    feedback: int
    prefixes: Prefixes


@dataclass(frozen=True)
class Cleared:
    """What became of one part: how many things were removed, or None if the file could not be written."""

    what: str
    removed: int | None

    def __str__(self) -> str:
        if self.removed is None:
            return f"the {self.what} could not be removed: the file is in use or cannot be written"
        return f"removed {self.removed} {self.what}"


def cache_info(config: Config) -> CacheInfo:
    """Read it all; nothing is made where nothing is. A damaged state file is emptied, as the daemon would do.

    Raises:
        ConfigError: the state file is there but cannot be used.
    """
    folder = cache_dir(config)
    path = state_path(state_dir(config))
    with existing_state(path) as db:
        return CacheInfo(
            path=str(path),
            size_bytes=sum(_size(part) for part in state_files(path)),
            responses=response_stats(db) if db else ResponseStats(0, 0, 0),
            popular=popular_counts(db) if db else {},
            findings=stored_findings(db) if db else [],
            feedback=feedback_count(db) if db else 0,
            prefixes=_prefixes(folder),
        )


def format_info(info: CacheInfo) -> str:
    """A few lines for people."""
    responses = info.responses
    lines = [
        f"state      {info.path}, {info.size_bytes / 1e6:.2f} MB on disk",
        f"responses  {responses.entries}, {responses.nbytes / 1e6:.2f} MB, {responses.hits} hits",
        f"popular    {sum(info.popular.values())} queries of {len(info.popular)} users",
        *(f"           {user}: {count}" for user, count in info.popular.items()),
        f"feedback   {info.feedback} entries",
        f"prefixes   {info.prefixes.files} files, {info.prefixes.nbytes / 1e6:.2f} MB",
        *(f"finding    {finding.user}, {finding.count} times: {finding}" for finding in info.findings),
    ]
    return "\n".join(lines)


def clear_cache(config: Config, user: str | None, parts: Collection[str]) -> Iterator[Cleared]:
    """Remove some parts, or with none named everything, and yield what became of each.

    With none named, running daemons drop what they hold of that user, or of everybody, conversations included.

    Args:
        config: where the caches are.
        user: only what belongs to this user.
        parts: some of ``PARTS``.

    Raises:
        ConfigError: prefixes of one user were asked for, or the state file cannot be used.
    """
    if user is not None and "prefixes" in parts:
        raise ConfigError("--prefixes with --user: snapshots hold system prompts, which belong to no user")
    folder = cache_dir(config)
    whose = "" if user is None else f" of {user}"
    with existing_state(state_path(state_dir(config))) as db:
        if not parts or "responses" in parts:
            yield Cleared(f"responses{whose}", clear_responses(db, user) if db else 0)
        if not parts or "popular" in parts:
            yield Cleared(f"popular queries{whose}", clear_popular(db, user) if db else 0)
        if not parts or "feedback" in parts:
            yield Cleared(f"feedback entries{whose}", clear_feedback(db, user) if db else 0)
        if not parts:
            yield Cleared(f"findings{whose}", clear_findings(db, user) if db else 0)
    if user is None and (not parts or "prefixes" in parts):
        yield Cleared("prefix snapshots", _remove_prefixes(folder))
    if not parts:
        try:
            announce_erasure(state_dir(config), user)
        except OSError:
            yield Cleared(f"memory{whose} in a running daemon", None)


def recent_finding(config: Config, now: float) -> Finding | None:
    """The latest finding of the last days that is more than a single change; see ``cache/prefix_lint.py``.

    Raises:
        ConfigError: the state file is there but cannot be used.
    """
    with existing_state(state_path(state_dir(config))) as db:
        return next((finding for finding in stored_findings(db) if finding.is_habit(now)), None) if db else None


def _prefix_files(folder: Path) -> list[Path]:
    return [path for path in (folder / SNAPSHOT_FOLDER).rglob("*") if path.is_file()]


def _prefixes(folder: Path) -> Prefixes:
    sizes = [_size(path) for path in _prefix_files(folder)]
    return Prefixes(len(sizes), sum(sizes))


def _remove_prefixes(folder: Path) -> int | None:
    files = _prefix_files(folder)
    try:
        for path in files:
            path.unlink(missing_ok=True)
    except OSError:
        return None
    return len(files)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0  # gone meanwhile
