"""Bundles in archives: .tar, .tar.gz and .zip, read as what a stranger may have made.

A member is a plain file with a flat name or one below graphs/<target>/, all of them at the top or in one folder. Links,
devices, encrypted members and names that appear twice are refused. Nothing is unpacked but the files that are asked
for, and no more of each than is asked for.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import stat
import tarfile
import zipfile
import zlib
from pathlib import PurePosixPath
from typing import IO, TYPE_CHECKING, Any, Final, cast

from edge_llm.bundle.manifest import PATH_PATTERN
from edge_llm.errors import BundleIntegrityError, BundleNotFoundError, EdgeLlmError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

_MAX_MEMBERS: Final = 2048
# Names, sizes and extended headers of that many members, with room to spare.
_MAX_HEADER_BYTES: Final = 8 << 20
_COPY_BYTES: Final = 1 << 20
_BLOCK_BYTES: Final = 512
_GZIP_MAGIC: Final = b"\x1f\x8b"
_ZIP_MAGIC: Final = b"PK"
# What the libraries raise for damaged archives.
_DAMAGE: Final = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    ValueError,
    OverflowError,
    RecursionError,
    NotImplementedError,
    gzip.BadGzipFile,
)


class Archive:
    """The members of an archive that may be a bundle's. Use ``open_archive``.

    Args:
        members: what opens each, and its size in bytes, by its name within the bundle.
        visit: calls a function with the name of each member and its open file, in the order in which they lie.
        head_bytes: files that are read before the others, with their bounds.
    """

    def __init__(
        self,
        members: Mapping[str, int],
        visit: Callable[[Callable[[str, IO[bytes]], None]], None],
        head_bytes: Mapping[str, int],
    ) -> None:
        self._members = members
        self._visit = visit
        self._head_bytes = head_bytes

    def read_head(self) -> dict[str, bytes]:
        """The small files that come first."""
        head: dict[str, bytes] = {}
        for name, max_bytes in self._head_bytes.items():
            if self._members.get(name, 0) > max_bytes:
                raise BundleIntegrityError(f"{name} in the archive is larger than {max_bytes} bytes")

        def read(name: str, stream: IO[bytes]) -> None:
            if name in self._head_bytes:
                head[name] = stream.read(self._members[name])

        self._visit(read)
        return head

    def copy(self, sizes: Mapping[str, int], folder: Path) -> None:
        """Unpack files into ``folder``."""
        for name, size_bytes in sizes.items():
            if name not in self._members:
                raise BundleNotFoundError(f"{name}, which the manifest names, is not in the archive")
            if self._members[name] != size_bytes:
                raise BundleIntegrityError(
                    f"{name} in the archive has {self._members[name]} bytes, the manifest says {size_bytes}"
                )

        def write(name: str, stream: IO[bytes]) -> None:
            if name in sizes:
                with open(folder / name, "xb") as target:
                    left = sizes[name]
                    while left and (block := stream.read(min(left, _COPY_BYTES))):
                        target.write(block)
                        left -= len(block)

        self._visit(write)


@contextlib.contextmanager
def open_archive(path: Path, head_bytes: Mapping[str, int]) -> Iterator[Archive]:
    """An archive whose every member's name and kind has been checked.

    Args:
        path: the file; what it is shows in its first bytes, not in its name.
        head_bytes: files of a bundle that are read before the others, with the most bytes that each may have.

    Raises:
        BundleIntegrityError: it is no archive, damaged, or something in it is not what a bundle has.
        OSError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            magic = file.read(2)
            file.seek(0)
            if magic == _ZIP_MAGIC:
                bounded = _Bounded(file, os.fstat(file.fileno()).st_size)
                with zipfile.ZipFile(cast("IO[bytes]", bounded)) as archive:
                    bounded.is_header = False
                    yield _zip(archive, head_bytes)
            else:
                yield _tar(file, is_gzip=magic == _GZIP_MAGIC, head_bytes=head_bytes)
    except _DAMAGE as error:
        if isinstance(error, EdgeLlmError):
            raise
        reason = str(error) or type(error).__name__
        raise BundleIntegrityError(f"{path} is not a .tar, .tar.gz or .zip, or it is damaged: {reason}") from None


def _zip(archive: zipfile.ZipFile, head_bytes: Mapping[str, int]) -> Archive:
    names: dict[str, str] = {}
    members: dict[str, int] = {}
    for info in archive.infolist():
        kind = stat.S_IFMT(info.external_attr >> 16)
        if info.filename.endswith("/"):  # is_dir() fails on an empty name
            continue
        if kind not in (0, stat.S_IFREG) or info.flag_bits & 1:
            raise BundleIntegrityError(f"{info.filename!r} in the archive is a link, encrypted, or no plain file")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise BundleIntegrityError(f"{info.filename!r} is packed in a way that is not read: use deflate")
        _enter(names, info.filename)
        members[info.filename] = info.file_size
    inside = _inside(names)

    def visit(act: Callable[[str, IO[bytes]], None]) -> None:
        for filename, name in inside.items():
            with archive.open(filename) as stream:
                act(name, stream)

    return Archive({name: members[filename] for filename, name in inside.items()}, visit, head_bytes)


def _tar(file: IO[bytes], *, is_gzip: bool, head_bytes: Mapping[str, int]) -> Archive:
    names: dict[str, str] = {}
    members: dict[str, int] = {}
    # A tar tells sizes as it goes; what is larger than the disk has room for is no bundle that fits.
    limit_bytes = _tar_limit(file, is_gzip=is_gzip)

    def each(act: Callable[[tarfile.TarFile, tarfile.TarInfo], None]) -> None:
        file.seek(0)
        with contextlib.ExitStack() as stack:
            plain = stack.enter_context(gzip.GzipFile(fileobj=file)) if is_gzip else file
            bounded = _Bounded(plain, limit_bytes)
            archive = stack.enter_context(tarfile.open(fileobj=cast("IO[bytes]", bounded), mode="r:", errorlevel=2))
            while (member := archive.next()) is not None:
                bounded.is_header = False
                if member.size < 0 or member.offset_data + member.size > limit_bytes:
                    raise BundleIntegrityError(f"{member.name!r} in the archive claims {member.size} bytes")
                act(archive, member)
                bounded.is_header = True

    def enter(_archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        if member.isdir():
            return
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
            raise BundleIntegrityError(f"{member.name!r} in the archive is a link or no plain file")
        _enter(names, member.name)
        members[member.name] = member.size

    each(enter)
    inside = _inside(names)

    def visit(act: Callable[[str, IO[bytes]], None]) -> None:
        def open_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
            stream = archive.extractfile(member) if member.name in inside else None
            if stream is not None:
                act(inside[member.name], stream)

        each(open_member)

    return Archive({name: members[filename] for filename, name in inside.items()}, visit, head_bytes)


def _tar_limit(file: IO[bytes], *, is_gzip: bool) -> int:
    size_bytes = os.fstat(file.fileno()).st_size
    # Deflate packs 1032 : 1 at the very most; no quantised weights come near a tenth of that.
    return 64 * size_bytes + _MAX_HEADER_BYTES if is_gzip else size_bytes


def _enter(names: dict[str, str], filename: str) -> None:
    """Note a member under its name without a leading ``./``."""
    name = filename.removeprefix("./")
    parts = PurePosixPath(name).parts
    if name != "/".join(parts) or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise BundleIntegrityError(f"the archive names {filename!r}: only plain names below one folder are allowed")
    if name in names.values():
        raise BundleIntegrityError(f"{filename!r} is in the archive twice")
    if len(names) >= _MAX_MEMBERS:
        raise BundleIntegrityError(f"there are more than {_MAX_MEMBERS} files in the archive")
    names[filename] = name


def _inside(names: Mapping[str, str]) -> dict[str, str]:
    """The members' names within the bundle, which may lie in one folder; what no bundle has is refused."""
    tops = {name.partition("/")[0] for name in names.values()}
    top = next(iter(tops)) + "/" if len(tops) == 1 and all("/" in name for name in names.values()) else ""
    inside = {filename: name.removeprefix(top) for filename, name in names.items()}
    for filename, name in inside.items():
        if not PATH_PATTERN.fullmatch(name) or ".." in name:
            raise BundleIntegrityError(
                f"the archive holds {filename!r}: only a bundle's files are allowed, flat or in graphs/<target>/"
            )
    return inside


class _Bounded:
    """A file for tarfile and zipfile, which read as much of a header as the header says, and seek where it says.

    Args:
        stream: what is read.
        size_bytes: beyond it nothing is looked for.

    Attributes:
        is_header: whether what is read now counts as header; the bytes of members are bounded elsewhere.
    """

    def __init__(self, stream: Any, size_bytes: int) -> None:
        self._stream = stream
        self._size_bytes = size_bytes
        self._header_bytes_left = _MAX_HEADER_BYTES
        self.is_header = True

    def read(self, count: int = -1) -> bytes:
        """At most so many bytes; headers end at some point, even if they lead in a circle."""
        if count > _MAX_HEADER_BYTES or self._header_bytes_left < 0:
            raise BundleIntegrityError("the headers of the archive are unreasonably large")
        if self.is_header:
            self._header_bytes_left -= max(_BLOCK_BYTES, count)
        block: bytes = self._stream.read(min(_MAX_HEADER_BYTES, count if count >= 0 else _MAX_HEADER_BYTES))
        return block

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As a file's."""
        if whence == os.SEEK_SET and not 0 <= offset <= self._size_bytes:
            raise BundleIntegrityError("the archive points outside of itself")
        return int(self._stream.seek(offset, whence))

    def tell(self) -> int:
        """As a file's."""
        return int(self._stream.tell())

    def seekable(self) -> bool:
        """As a file's."""
        return True
