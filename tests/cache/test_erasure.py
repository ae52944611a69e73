"""How running daemons learn whom they must forget."""

from __future__ import annotations

import pytest

from edge_llm.cache.erasure import ERASURE_FILE, ErasureNotices, announce_erasure


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
