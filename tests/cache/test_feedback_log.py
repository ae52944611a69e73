"""Refused, failed and rated answers, kept on the device for whoever writes the pack."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edge_llm.cache.feedback_log import FeedbackEntry, FeedbackLog, clear_feedback, stored_feedback
from edge_llm.cache.state_db import StateDb, state_path
from edge_llm.feedback_command import format_feedback

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FLUSH_S = 10
OPEN_TRUNK = '[{"name":"trunk.open","slots":{},"confidence":0.9,"confirm":true}]'
CALL = '[{"name":"phone.call","slots":{"contact":"the old mill"},"confidence":0.9,"confirm":false}]'


def entry(text: str = "open it", user: str = "ann", **changes) -> FeedbackEntry:
    fields = {"user": user, "reason": "refused", "text": text, "kind": "refusal", "actions": "[]", "answer": "No."}
    return FeedbackEntry(**fields | changes)


def test_entries_come_back_in_order_and_the_oldest_go_first(db):
    log = FeedbackLog(db, max_entries=3)
    for number in range(5):
        log.record(entry(f"say {number}"))
    assert db.flush(FLUSH_S)
    assert [kept.text for kept in stored_feedback(db)] == ["say 2", "say 3", "say 4"]
    assert all(kept.at > 1e9 for kept in stored_feedback(db))


def test_one_users_entries_can_be_erased(db):
    log = FeedbackLog(db, max_entries=10)
    log.record(entry(user="ann"))
    log.record(entry(user="bob"))
    assert db.flush(FLUSH_S)
    assert clear_feedback(db, "ann") == 1
    assert [kept.user for kept in stored_feedback(db)] == ["bob"]
    assert clear_feedback(db) == 1


@pytest.mark.parametrize("damage", ["rating = 'good'", "text = x'ff'", "reason = 'else'", "at = 'now'"])
def test_a_damaged_row_is_none(db, damage):
    log = FeedbackLog(db, max_entries=10)
    log.record(entry("one"))
    log.record(entry("two"))
    assert db.write(lambda connection: connection.execute(f"UPDATE feedback SET {damage} WHERE text = 'one'"))
    assert db.flush(FLUSH_S)
    assert [kept.text for kept in stored_feedback(db)] == ["two"]


@pytest.mark.parametrize("actions", ["\0", "[1]", "{}", '[{"name": "x", "slots": 3}]', "[" * 100_000])
def test_damaged_actions_are_left_out_of_the_export(actions):
    text = format_feedback([entry("pop the trunk", reason="rated", kind="command", actions=actions, rating=1)])
    assert "# pop the trunk\n" in text
    assert not tomllib.loads(text)["mixed"][0]["utterances"].startswith("pop")


def test_a_long_text_is_cut(db):
    FeedbackLog(db, max_entries=10).record(entry("a" * 10_000))
    assert db.flush(FLUSH_S)
    assert len(stored_feedback(db)[0].text) == 2000


def test_the_export_is_toml_whose_ready_lines_are_those_rated_good():
    text = format_feedback(
        [
            entry("pop the trunk", reason="rated", kind="command", actions=OPEN_TRUNK, rating=1),
            entry("call the old mill", reason="rated", kind="command", actions=CALL, rating=1),
            entry(
                "boot of my ''' other | car", reason="rated", actions=OPEN_TRUNK, rating=-1, correction="the\nbonnet"
            ),
            entry("is it wet"),
        ]
    )
    lines = [line for line in tomllib.loads(text)["mixed"][0]["utterances"].splitlines() if not line.startswith("#")]
    assert lines == ["pop the trunk | trunk.open", 'call the old mill | phone.call contact="the old mill"']
    assert "# boot of my ' other / car | trunk.open" in text
    assert "corrected to: the bonnet" in text
    assert "# is it wet\n" in text


def feedback(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as users run it: it sets up logging for its whole process."""
    command = [sys.executable, "-m", "edge_llm.cli", "feedback", *arguments, "--set", f"state_dir={folder}"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_commands_export_and_erase(tmp_path: Path):
    db = StateDb.open(state_path(tmp_path))
    FeedbackLog(db, max_entries=10).record(entry("is it wet"))
    db.close()
    out = tmp_path / "review.toml"
    assert feedback(tmp_path, "export", "--out", str(out)).returncode == 0
    assert "# is it wet" in out.read_text()
    assert out.stat().st_mode & 0o777 == 0o600
    again = feedback(tmp_path, "export", "--out", str(out))
    assert (again.returncode, "is there already" in again.stderr) == (2, True)
    assert feedback(tmp_path, "clear", "--user", "bob").stdout == "removed 0 feedback entries\n"
    assert feedback(tmp_path, "clear").stdout == "removed 1 feedback entries\n"


def test_exporting_nothing_makes_no_file(tmp_path: Path):
    assert "0 utterances" in feedback(tmp_path, "export").stdout
    assert not state_path(tmp_path).exists()
