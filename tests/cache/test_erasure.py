"""How running daemons learn whom they must forget."""

from __future__ import annotations

import shutil

import pytest

from edge_llm.cache.erasure import ERASURE_FILE, EVERYBODY, ErasureNotices, announce_erasure


def test_a_notice_names_one_user_without_writing_the_name(tmp_path):
    notices = ErasureNotices(tmp_path)
    assert notices.poll() == []
    announce_erasure(tmp_path, "ann")
    (erasure,) = notices.poll()
    assert erasure.concerns("ann")
    assert not erasure.concerns("bob")
    assert not erasure.concerns("")
    assert b"ann" not in (tmp_path / ERASURE_FILE).read_bytes()
    assert notices.poll() == []


def test_everybody(tmp_path):
    notices = ErasureNotices(tmp_path)
    announce_erasure(tmp_path, None)
    (erasure,) = notices.poll()
    assert erasure.concerns("ann")
    assert erasure.concerns("bob")


def test_what_was_announced_before_the_start_is_past(tmp_path):
    announce_erasure(tmp_path, "ann")
    notices = ErasureNotices(tmp_path)
    assert notices.poll() == []
    announce_erasure(tmp_path, "bob")
    announce_erasure(tmp_path, "cid")
    assert [[erasure.concerns(name) for name in ("ann", "bob", "cid")] for erasure in notices.poll()] == [
        [False, True, False],
        [False, False, True],
    ]


def test_the_file_stays_small_and_no_notice_is_missed(tmp_path):
    notices = ErasureNotices(tmp_path)
    for number in range(1000):
        announce_erasure(tmp_path, f"user{number}")
        (erasure,) = notices.poll()
        assert erasure.concerns(f"user{number}")
        assert (tmp_path / ERASURE_FILE).stat().st_size < 20_000


@pytest.mark.parametrize("line", [b"\xff\n", b"zz zz\n", b"everybody", b"00 11 22\n", b"\n"])
def test_a_damaged_notice_is_taken_for_everybody(tmp_path, line):
    notices = ErasureNotices(tmp_path)
    (tmp_path / ERASURE_FILE).write_bytes(line)
    (erasure,) = notices.poll()
    assert erasure.concerns("ann")
    assert erasure.concerns("bob")


def test_names_that_no_file_could_hold(tmp_path):
    notices = ErasureNotices(tmp_path)
    for name in ("", "a" * 100_000, "\ud800", "a\nb", "ünï"):
        announce_erasure(tmp_path, name)
        (erasure,) = notices.poll()
        assert erasure.concerns(name)


def test_where_no_daemon_has_run_nothing_is_made(tmp_path):
    announce_erasure(tmp_path / "none", "ann")
    assert not (tmp_path / "none").exists()


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("x")
    (tmp_path / ERASURE_FILE).symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic"):
        announce_erasure(tmp_path, "ann")
    assert (tmp_path / "precious").read_text() == "x"


def test_a_folder_that_is_deleted_is_taken_for_everybody_and_made_again(tmp_path):
    folder = tmp_path / "state"
    folder.mkdir()
    announce_erasure(folder, "ann")
    notices = ErasureNotices(folder)
    shutil.rmtree(folder)
    assert notices.poll() == [EVERYBODY]
    assert notices.poll() == []
    assert folder.is_dir()
    # Somebody else makes it again at once; a file system likes to give the same number.
    shutil.rmtree(folder)
    folder.mkdir()
    assert notices.poll() == [EVERYBODY]
    # It can be told again whom to forget.
    announce_erasure(folder, "bob")
    (erasure,) = notices.poll()
    assert [erasure.concerns(name) for name in ("ann", "bob")] == [False, True]


def test_a_folder_that_cannot_be_made_again_is_waited_for(tmp_path):
    folder = tmp_path / "state"
    folder.mkdir()
    notices = ErasureNotices(folder)
    folder.rmdir()
    folder.symlink_to(tmp_path / "missing")
    assert notices.poll() == [EVERYBODY]
    assert notices.poll() == []
    folder.unlink()
    assert notices.poll() == []
    announce_erasure(folder, "ann")
    (erasure,) = notices.poll()
    assert erasure.concerns("ann")


def test_a_folder_that_is_not_there_yet_is_made_and_nobody_is_forgotten(tmp_path):
    notices = ErasureNotices(tmp_path / "new" / "state")
    assert notices.poll() == []
    assert (tmp_path / "new" / "state").stat().st_mode & 0o777 == 0o700
    assert notices.poll() == []
