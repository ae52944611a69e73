"""``edge-llm feedback export|clear``: what went wrong, as lines for the pack, to be looked through by a person."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edge_llm.cache.feedback_log import FeedbackEntry, clear_feedback, stored_feedback
from edge_llm.cache.state_db import existing_state, state_path
from edge_llm.config import state_dir
from edge_llm.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edge_llm.config import Config

_HEAD = """# {count} utterances to look through, for `python -m export distill --extra FILE`.
# A line that begins with "#" is not used. Write what it means after " | ", or move it under [[same_as]] with the name
# of the reply that it should get, and take the "#" away.
"""


class _Call(msgspec.Struct, frozen=True):
    """What is written of an action."""

    name: str
    slots: dict[str, int | float | str]


def export_feedback(config: Config, user: str | None) -> str:
    """Every entry as TOML. Lines that were rated good stand ready; the others are comments.

    Raises:
        ConfigError: the state file cannot be used.
    """
    with existing_state(state_path(state_dir(config))) as db:
        entries = stored_feedback(db, user) if db else []
    return format_feedback(entries)


def erase_feedback(config: Config, user: str | None) -> int | None:
    """Remove the entries of one user, or all; how many, or None if the file could not be written."""
    with existing_state(state_path(state_dir(config))) as db:
        return clear_feedback(db, user) if db else 0


def format_feedback(entries: Sequence[FeedbackEntry]) -> str:
    """The TOML text."""
    good = [entry for entry in entries if (entry.rating or 0) > 0 and _calls(entry)]
    lines = [_HEAD.format(count=len(entries)), "[[mixed]]", 'name = "feedback"', "utterances = '''"]
    lines += dict.fromkeys(f"{_one_line(entry.text)} | {_calls(entry)}" for entry in good)
    for entry in entries:
        if entry not in good:
            lines.append(f"# {_why(entry)}; it said: {_one_line(entry.answer)}")
            lines.append(f"# {_one_line(entry.text)} | {_calls(entry)}".rstrip(" |"))
    lines += ["'''", "", "# [[same_as]]", '# reply = "weather"', "# utterances = '''", "# '''", ""]
    return "\n".join(lines)


def write_export(text: str, out: Path) -> None:
    """Write the file, readable by its owner alone. Raises ``ConfigError`` if it is there already, or cannot be."""
    try:
        out.touch(mode=0o600, exist_ok=False)
        out.write_text(text, encoding="utf-8")
    except FileExistsError:
        raise ConfigError(f"{out} is there already: give --out another path") from None
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror}") from None


def _why(entry: FeedbackEntry) -> str:
    if entry.reason != "rated":
        return entry.reason
    correction = "" if entry.correction is None else f", corrected to: {_one_line(entry.correction)}"
    return f"rated {entry.rating}{correction}"


def _calls(entry: FeedbackEntry) -> str:
    """The actions in the form that packs write them; none if the entry was damaged on the disk."""
    try:
        calls = msgspec.json.decode(entry.actions, type=list[_Call])
    except (msgspec.MsgspecError, UnicodeEncodeError):
        return ""
    return "; ".join(
        call.name + "".join(f" {name}={_quoted(value)}" for name, value in call.slots.items()) for call in calls
    )


def _quoted(value: object) -> str:
    text = str(value)
    return f'"{text}"' if " " in text or "'" in text else text


def _one_line(text: str) -> str:
    # Three quotes would end the block, and a bar the words.
    return " ".join(text.replace("'''", "'").replace("|", "/").split())
