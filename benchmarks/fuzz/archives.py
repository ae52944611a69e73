"""Subject: a bundle in an archive from a stranger, as `edge-llm bundle install` reads it."""

from __future__ import annotations

import gzip
import io
import shutil
import tarfile
import zipfile
from typing import TYPE_CHECKING, Final

from benchmarks.fuzz.bundle_files import SMALL_BUNDLE
from benchmarks.fuzz.mutation import TEXTS, damaged
from benchmarks.fuzz.subject import require
from edge_llm.bundle.archive import open_archive
from edge_llm.bundle.incoming import HEAD_BYTES
from edge_llm.bundle.manifest import MANIFEST_FILE, decode_manifest
from edge_llm.errors import BundleNotFoundError

if TYPE_CHECKING:
    from pathlib import Path
    from random import Random

_KINDS: Final = ("tar", "tar.gz", "zip")
_TYPES: Final = (tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, tarfile.CONTTYPE)
_TAR_BLOCK_BYTES: Final = 512


class Archives:
    """An archive with odd members, or damaged bytes; of a tar sometimes only the headers."""

    def __init__(self, folder: Path) -> None:
        files = sorted(path for path in SMALL_BUNDLE.rglob("*") if path.is_file())
        self._files = {str(path.relative_to(SMALL_BUNDLE)): path.read_bytes() for path in files}
        self._path = folder / "bundle.archive"
        self._out = folder / "out"

    def make(self, rng: Random) -> bytes:
        """An archive."""
        kind = rng.choice(_KINDS)
        odd = rng.random() < 0.5
        raw = self._zip(rng if odd else None) if kind == "zip" else self._tar(rng if odd else None)
        if not odd and kind == "zip":
            # The directory of a zip is its end; most of the rest is weights, whose hashes are checked later.
            at = len(raw) - 1200
            raw = raw[:at] + damaged(raw[at:], rng)
        elif not odd:
            at = rng.choice(self._headers)
            raw = raw[:at] + damaged(raw[at : at + _TAR_BLOCK_BYTES], rng) + raw[at + _TAR_BLOCK_BYTES :]
        if kind != "tar.gz":
            return raw
        packed = gzip.compress(raw, 1)
        return damaged(packed, rng) if rng.random() < 0.3 else packed

    def take(self, case: bytes) -> str:
        """Read its manifest, and unpack what that names."""
        self._path.write_bytes(case)
        shutil.rmtree(self._out, ignore_errors=True)
        with open_archive(self._path, HEAD_BYTES) as archive:
            head = archive.read_head()
            if MANIFEST_FILE not in head:
                raise BundleNotFoundError("no manifest in it")
            manifest = decode_manifest(head[MANIFEST_FILE])
            sizes = {entry.path: entry.size_bytes for entry in manifest.files}
            for name in sizes:
                (self._out / name).parent.mkdir(parents=True, exist_ok=True)
            archive.copy(sizes, self._out)
        there = {str(path.relative_to(self._out)) for path in self._out.rglob("*") if not path.is_dir()}
        require(there <= sizes.keys(), "a file was unpacked that the manifest does not name")
        require(not any(path.is_symlink() for path in self._out.rglob("*")), "a link was unpacked")
        return "unpacked"

    def _tar(self, rng: Random | None) -> bytes:
        buffer = io.BytesIO()
        self._headers = []
        with tarfile.open(
            fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT if rng else tarfile.PAX_FORMAT
        ) as archive:
            at = -1 if rng is None else rng.randrange(len(self._files))
            for index, (name, content) in enumerate(self._files.items()):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                if rng is not None and index == at:
                    names = (name, f"../{name}", f"/{name}", *(text for text in TEXTS if text.isprintable()))
                    member.name = rng.choice(names) or "x"
                    member.type = rng.choice(_TYPES)
                    member.linkname = rng.choice(("/etc/passwd", "../x", name))
                self._headers.append(buffer.tell())
                archive.addfile(member, io.BytesIO(content))
        return buffer.getvalue()

    def _zip(self, rng: Random | None) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            at = -1 if rng is None else rng.randrange(len(self._files))
            for index, (name, content) in enumerate(self._files.items()):
                info = zipfile.ZipInfo(name)
                if rng is not None and index == at:
                    info.filename = rng.choice((name, f"../{name}", f"/{name}", *(t for t in TEXTS if t.isascii())))
                    info.external_attr = rng.choice((0o120777, 0o100644, 0o010644)) << 16
                    info.compress_type = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
                archive.writestr(info, content, compresslevel=1)
        return buffer.getvalue()
