"""Bundles from outside: what is taken, and what an archive may not bring with it."""

from __future__ import annotations

import io
import shutil
import stat
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest

from edge_llm.bundle import incoming
from edge_llm.bundle.incoming import install
from edge_llm.bundle.manifest import Bundle
from edge_llm.bundle.store import BundleStore
from edge_llm.errors import BundleError, BundleIntegrityError, BundleNotFoundError, ConfigError, EdgeLlmError
from tests.paths import TINY_BUNDLE

DIGEST = Bundle.open(TINY_BUNDLE).digest
GRAPH = "graphs/cpu-int8/model.onnx"


@pytest.fixture
def store(tmp_path):
    return BundleStore(tmp_path / "store")


@pytest.fixture
def copy(tmp_path):
    return Path(shutil.copytree(TINY_BUNDLE, tmp_path / "bundle"))


def tar(path: Path, folder: Path = TINY_BUNDLE, mode: str = "w", top: str = "") -> Path:
    with tarfile.open(path, mode) as archive:
        archive.add(folder, top or ".")
    return path


def zip_of(path: Path, folder: Path = TINY_BUNDLE, top: str = "") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in folder.rglob("*"):
            archive.write(file, top + str(file.relative_to(folder)))
    return path


def assert_nothing_is_left(store: BundleStore) -> None:
    assert store.digests() == []
    assert not [path.name for path in store.folder.glob("*") if not path.name.endswith(".lock")]
    assert not list(store.folder.glob(".incoming-*"))


SOURCES = {
    "folder": lambda _folder: TINY_BUNDLE,
    "tar": lambda folder: tar(folder / "b.tar"),
    "tar in a folder": lambda folder: tar(folder / "b.tar", top="tiny"),
    "tar.gz": lambda folder: tar(folder / "b.tar.gz", mode="w:gz"),
    "tar.gz in a folder": lambda folder: tar(folder / "b.tgz", mode="w:gz", top="tiny"),
    "zip": lambda folder: zip_of(folder / "b.zip"),
    "zip in a folder": lambda folder: zip_of(folder / "b.zip", top="tiny/"),
    "a name that says nothing": lambda folder: tar(folder / "download", mode="w:gz"),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_it_is_all_there_or_there_already(store, tmp_path, kind):
    source = SOURCES[kind](tmp_path)
    bundle, is_new = install(store, source)
    assert (bundle.digest, is_new) == (DIGEST, True)
    assert store.digests() == [DIGEST]
    store.open(DIGEST).verify()
    listed = {entry.path for entry in bundle.manifest.files} | {"manifest.json"}
    assert {str(path.relative_to(bundle.path)) for path in bundle.path.rglob("*") if path.is_file()} == listed
    assert install(store, source)[1] is False
    assert not list(store.folder.glob(".incoming-*"))


def test_a_damaged_copy_is_replaced(store):
    bundle, _ = install(store, TINY_BUNDLE)
    (bundle.path / GRAPH).write_bytes(b"damaged")
    assert install(store, TINY_BUNDLE)[1] is True
    store.open(DIGEST).verify()
    assert not list(store.folder.glob(".incoming-*"))


def test_only_what_the_manifest_names_is_taken(store, copy):
    (copy / "notes.txt").write_text("mine")
    assert not (install(store, copy)[0].path / "notes.txt").exists()


def test_leftovers_of_a_killed_installation_are_neither_shown_nor_kept(store):
    store.folder.mkdir()
    leftover = store.folder / ".incoming-abc"
    shutil.copytree(TINY_BUNDLE, leftover)
    assert store.digests() == []
    install(store, TINY_BUNDLE)
    assert not leftover.exists()


def damage_missing(copy):
    (copy / "tokenizer.json").unlink()


def damage_flipped(copy):
    content = bytearray((copy / f"{GRAPH}.data").read_bytes())
    content[1000] ^= 1
    (copy / f"{GRAPH}.data").write_bytes(content)


def damage_longer(copy):
    with (copy / "quality.json").open("ab") as stream:
        stream.write(b" ")


def damage_no_manifest(copy):
    (copy / "manifest.json").unlink()


@pytest.mark.parametrize(
    "pack", [lambda copy, _to: copy, lambda copy, to: tar(to, copy), lambda copy, to: zip_of(to, copy)]
)
@pytest.mark.parametrize("damage", [damage_missing, damage_flipped, damage_longer, damage_no_manifest])
def test_what_is_not_whole_leaves_nothing(store, copy, tmp_path, damage, pack):
    damage(copy)
    with pytest.raises(BundleError):
        install(store, pack(copy, tmp_path / "packed"))
    assert_nothing_is_left(store)


def test_a_link_in_a_folder_is_refused(store, copy):
    (copy / "tokenizer.json").rename(copy / "elsewhere")
    (copy / "tokenizer.json").symlink_to("elsewhere")
    with pytest.raises(BundleIntegrityError, match="is a link"):
        install(store, copy)
    assert_nothing_is_left(store)


def member(name: str, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def tar_with(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    tar(path)
    with tarfile.open(path, "a") as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return path


UNSAFE_MEMBERS = {
    "above": member("../evil"),
    "inside out": member("graphs/../../evil"),
    "absolute": member("/etc/evil"),
    "deep": member("graphs/cpu-int8/more/evil"),
    "no name of ours": member("a b"),
    "symbolic link": member("evil", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "hard link": member("evil", type=tarfile.LNKTYPE, linkname="manifest.json"),
    "device": member("evil", type=tarfile.CHRTYPE),
    "pipe": member("evil", type=tarfile.FIFOTYPE),
    "twice": member("tokenizer.json"),
    "twice, spelt otherwise": member("./tokenizer.json"),
}


@pytest.mark.parametrize("name", UNSAFE_MEMBERS)
def test_an_unsafe_member_of_a_tar_spoils_it(store, tmp_path, name):
    with pytest.raises(BundleIntegrityError, match="archive"):
        install(store, tar_with(tmp_path / "b.tar", (UNSAFE_MEMBERS[name], b"")))
    assert_nothing_is_left(store)
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "graphs\\..\\..\\evil", "tokenizer.json", "x/y"])
def test_an_unsafe_member_of_a_zip_spoils_it(store, tmp_path, name):
    path = zip_of(tmp_path / "b.zip")
    with zipfile.ZipFile(path, "a") as archive, pytest.warns() if name == "tokenizer.json" else _nothing():
        archive.writestr(name, b"evil")
    with pytest.raises(BundleIntegrityError, match="archive"):
        install(store, path)
    assert_nothing_is_left(store)


class _nothing:  # noqa: N801
    def __enter__(self): ...
    def __exit__(self, *_): ...


def test_a_member_of_a_zip_without_a_name_spoils_it(store, tmp_path):
    path = zip_of(tmp_path / "b.zip")
    info = zipfile.ZipInfo("evil")
    info.filename = ""
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(info, b"evil")
    with pytest.raises(BundleIntegrityError, match="archive"):
        install(store, path)
    assert_nothing_is_left(store)


def test_a_link_in_a_zip_is_refused(store, tmp_path):
    path = zip_of(tmp_path / "b.zip")
    info = zipfile.ZipInfo("evil")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(BundleIntegrityError, match="a link"):
        install(store, path)


def test_a_size_that_is_not_the_manifests_is_refused_before_it_is_read(store, tmp_path, copy, monkeypatch):
    (copy / "tokenizer.json").write_bytes(bytes(50 << 20))
    path = tar(tmp_path / "b.tar.gz", copy, "w:gz")
    assert path.stat().st_size < 1 << 20
    with pytest.raises(BundleIntegrityError, match=r"tokenizer\.json"):
        install(store, path)
    assert_nothing_is_left(store)
    with pytest.raises(BundleIntegrityError, match="has 52428800 bytes, the manifest says"):
        install(store, zip_of(tmp_path / "b.zip", copy))


def test_a_manifest_beyond_its_bound_is_not_read(store, tmp_path, copy):
    with (copy / "manifest.json").open("ab") as stream:
        stream.write(b" " * (5 << 20))
    with pytest.raises(BundleIntegrityError, match="larger than"):
        install(store, zip_of(tmp_path / "b.zip", copy))


def test_headers_beyond_measure_are_not_read(store, tmp_path):
    """A header says how much of a name follows: here it would be gigabytes, of zeros that gzip packs into nothing."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 4 << 30
    packer = zlib.compressobj(wbits=31)
    path = tmp_path / "b.tar.gz"
    path.write_bytes(packer.compress(info.tobuf() + bytes(1 << 20)) + packer.flush())
    with pytest.raises(BundleIntegrityError):
        install(store, path)


def test_many_small_headers_end_too(store, tmp_path):
    one = tarfile.TarInfo("x").tobuf()
    path = tmp_path / "b.tar"
    path.write_bytes(b"".join(tarfile.TarInfo(f"x{number}").tobuf() for number in range(3000)) + one)
    with pytest.raises(BundleIntegrityError, match="more than 2048 files"):
        install(store, path)


@pytest.mark.parametrize("pack", [tar, zip_of, lambda path: tar(path, mode="w:gz")])
def test_damaged_archives_are_refused_and_nothing_else_happens(store, tmp_path, pack):
    whole = pack(tmp_path / "whole").read_bytes()
    path = tmp_path / "cut"
    for content in (b"", b"PK", b"\x1f\x8b", whole[:100], whole[: len(whole) // 2], whole[::-1], bytes(2000)):
        path.write_bytes(content)
        with pytest.raises(EdgeLlmError):
            install(store, path)
        assert_nothing_is_left(store)


def test_every_flipped_byte_of_the_first_headers_is_refused_or_harmless(store, tmp_path):
    whole = tar(tmp_path / "whole").read_bytes()
    path = tmp_path / "flipped"
    for position in range(0, 1536, 13):
        content = bytearray(whole)
        content[position] ^= 0xFF
        path.write_bytes(content)
        try:
            install(store, path)
        except EdgeLlmError:
            continue
        store.open(DIGEST).verify()


def test_a_full_disk_is_said_before_anything_is_copied(store, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(incoming.shutil, "disk_usage", lambda _folder: usage._replace(free=1 << 20))
    with pytest.raises(ConfigError, match="no space for the bundle"):
        install(store, TINY_BUNDLE)
    assert_nothing_is_left(store)


def test_what_is_not_there_is_said(store, tmp_path):
    with pytest.raises(BundleNotFoundError, match=r"a bundle folder, or a \.tar"):
        install(store, tmp_path / "none")
