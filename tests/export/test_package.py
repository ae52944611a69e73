"""The bundle folder: all of it or nothing."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from edge_llm.bundle.manifest import Bundle
from edge_llm.errors import BundleIntegrityError
from export.errors import ExportError
from export.package import check_destination, check_space, publish, staging
from tests.paths import TINY_BUNDLE


def test_staged_folder_is_removed_on_error(tmp_path: Path) -> None:
    out = tmp_path / "new" / "deeper" / "bundle"

    def interrupted() -> None:
        with staging(out) as folder:
            (folder / "graphs").mkdir()
            (folder / "graphs" / "large").write_bytes(bytes(1000))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_folders_that_were_there_stay(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    with pytest.raises(ExportError), staging(tmp_path / "new" / "bundle"):
        raise ExportError("no")
    assert (tmp_path / "new").is_dir()


def test_what_a_killed_export_left_is_removed(tmp_path: Path) -> None:
    # No process has this number: Linux ends at 2 ** 22.
    stale = tmp_path / f".bundle.{2**30}.partial"
    other = tmp_path / ".bundle.partial"
    running = tmp_path / ".bundle.1.partial"
    for folder in (stale, other, running):
        folder.mkdir()
    with staging(tmp_path / "bundle"):
        pass
    assert not stale.exists()
    assert other.exists()
    assert running.exists()


def test_publish_is_a_rename_after_everything_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Bundle.open(TINY_BUNDLE).manifest
    out = tmp_path / "bundle"
    events: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        events.append(f"flush {kind}")
        real_fsync(descriptor)

    def rename(source: Path, target: Path) -> None:
        events.append("rename")
        assert not out.exists()
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    with staging(out) as folder:
        (folder / "graphs" / "cpu-int8").mkdir(parents=True)
        (folder / "graphs" / "cpu-int8" / "model.onnx").write_bytes(b"graph")
        publish(folder, out, manifest)
    # Two files, three folders, the rename, and the folder that holds the new name.
    assert sorted(events[:5]) == ["flush file"] * 2 + ["flush folder"] * 3
    assert events[5:] == ["rename", "flush folder"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


def test_somebody_else_was_faster(tmp_path: Path) -> None:
    out = tmp_path / "bundle"

    def late() -> None:
        with staging(out) as folder:
            out.mkdir()
            (out / "theirs").write_text("x")
            publish(folder, out, Bundle.open(TINY_BUNDLE).manifest)

    with pytest.raises(ExportError, match="something else was written"):
        late()
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert (out / "theirs").read_text() == "x"


def test_empty_output_folder_is_taken(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    out.mkdir()
    check_destination(out)
    with staging(out) as folder:
        publish(folder, out, Bundle.open(TINY_BUNDLE).manifest)
    assert (out / "manifest.json").is_file()


def test_link_is_no_output_folder(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ExportError, match="not a folder"):
        check_destination(tmp_path / "link")


def test_space_is_checked_with_both_figures(tmp_path: Path) -> None:
    check_space(tmp_path, 1)
    with pytest.raises(ExportError, match=r"needs 1000000000000 MB .* MB are free"):
        check_space(tmp_path, 10**18)


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(TINY_BUNDLE, tmp_path / "bundle")
    Bundle.open(copy).verify()
    data = copy / "graphs" / "cpu-int8" / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[1234] ^= 1
    data.write_bytes(content)
    with pytest.raises(BundleIntegrityError, match="SHA-256"):
        Bundle.open(copy).verify()
