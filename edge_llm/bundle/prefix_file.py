"""The file of one prefix's keys and values: shipped in a bundle, and saved on the device as a snapshot.

===================  =========================================================================
preamble             8 bytes magic, uint32 format version, uint32 length of the header
header               JSON: the key, the shape, the element type
token ids            ``(tokens,) uint32``
keys and values      ``(tokens, layers, 2, kv_heads, head_dim)``, float32 or float16
checksum             SHA-256 over everything before it
===================  =========================================================================

Numbers are little-endian. The checksum stands last, so that a file is written in one pass. The *key* names everything
that the values depend on: a file is only ever read by one who expects the same.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final, Literal

import msgspec
import numpy as np
from msgspec import Meta

from edge_llm.bundle.files import flush_to_disk
from edge_llm.errors import PrefixFileError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import BinaryIO

    from numpy.typing import NDArray

    from edge_llm.bundle.manifest import Manifest, ModelDims

PREFIX_FILE: Final = "prefix.kv"
FORMAT_VERSION: Final = 1
# Far above any real header: token ids are not in it.
MAX_HEADER_BYTES: Final = 4096
_MAGIC: Final = b"EDGELLMP"
_PREAMBLE: Final = struct.Struct("<8sII")
_CHECKSUM_BYTES: Final = hashlib.sha256().digest_size
_TOKEN_ID: Final = np.dtype("<u4")
_TEMPORARY_PATTERN: Final = re.compile(r"\..+\.kv\.[0-9a-f]{16}\.tmp")
# How often another process's tidying may hit the instant between creating a file and locking it.
_CREATE_ATTEMPTS: Final = 16

Size = Annotated[int, Meta(ge=1)]


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    key: str
    tokens: Size
    layers: Size
    kv_heads: Size
    head_dim: Size
    dtype: Literal["float32", "float16"]


@dataclass(frozen=True, eq=False)
class PrefixKV:
    """What a graph's cache holds for a run of tokens at the start of a sequence.

    Attributes:
        token_ids: the tokens, at positions 0 and on.
        kv: ``(tokens, layers, 2, kv_heads, head_dim)`` float32 or float16; of axis 2, 0 is keys and 1 values.
    """

    token_ids: tuple[int, ...]
    kv: NDArray[np.floating]

    def __post_init__(self) -> None:
        assert self.token_ids, "a prefix has tokens"
        assert self.kv.ndim == 5
        assert (self.kv.shape[0], self.kv.shape[2]) == (len(self.token_ids), 2)


def snapshot_key(*parts: str) -> str:
    """Hex SHA-256 over ``parts``, such that other parts never give the same key, however they are divided."""
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode(errors="surrogatepass")
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()


def shipped_prefix_key(manifest: Manifest, target: str) -> str:
    """The key of the prefix file that a bundle ships for a target.

    It is made of what the exporter knows before the file exists: the model's shape, the prompt template, the graph and
    the hashes of its files. It says nothing of the processor, since the exporter does not know the device's.

    Raises:
        ManifestError: the bundle has no such target.
    """
    graph = manifest.graph(target)
    hashes = {entry.path: entry.sha256 for entry in manifest.files}
    return snapshot_key(
        "bundle-prefix",
        target,
        graph.kv_dtype,
        msgspec.json.encode(manifest.model).decode(),
        msgspec.json.encode(manifest.prompt).decode(),
        hashes[graph.file],
        "" if graph.data_file is None else hashes[graph.data_file],
        *([] if graph.prefill_file is None else [hashes[graph.prefill_file]]),
    )


def encode_prefix(prefix: PrefixKV, key: str) -> Iterator[bytes | memoryview]:
    """The file's contents, piece by piece: the array is not copied, unless its elements are not in order already."""
    tokens, layers, _, kv_heads, head_dim = prefix.kv.shape
    dtype: Literal["float32", "float16"] = "float16" if prefix.kv.dtype == np.float16 else "float32"
    header = msgspec.json.encode(_Header(key, tokens, layers, kv_heads, head_dim, dtype))
    assert len(header) <= MAX_HEADER_BYTES, "a key is a short text"
    kv = np.ascontiguousarray(prefix.kv, np.dtype(dtype).newbyteorder("<"))
    digest = hashlib.sha256()
    pieces: tuple[bytes | memoryview, ...] = (
        _PREAMBLE.pack(_MAGIC, FORMAT_VERSION, len(header)) + header,
        np.asarray(prefix.token_ids, _TOKEN_ID).tobytes(),
        kv.reshape(-1).view(np.uint8).data,
    )
    for piece in pieces:
        digest.update(piece)
        yield piece
    yield digest.digest()


def write_prefix_file(path: Path, prefix: PrefixKV, key: str) -> None:
    """Write a prefix so that ``path`` is at every moment either what it was or the whole new file, on the disk, too.

    Whoever is killed on the way leaves a temporary file behind, which ``remove_leftovers`` finds.

    Args:
        path: the file; it ends in ``.kv``, its folder exists.
        prefix: what to write.
        key: what its values depend on.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    descriptor, temporary = _create_temporary(path)
    try:
        for piece in encode_prefix(prefix, key):
            _write_all(descriptor, piece)
        os.fsync(descriptor)
        # Still locked: once the lock is gone, the file has its own name.
        os.replace(temporary, path)
        temporary = path
        flush_to_disk(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    finally:
        os.close(descriptor)


def read_prefix_file(path: Path, key: str, dims: ModelDims, kv_dtype: str) -> PrefixKV:
    """Read a prefix that was written under ``key`` for such a model.

    Args:
        path: the file.
        key: what it must have been written under.
        dims: the model's shape; it also bounds what is read.
        kv_dtype: the cache's element type, ``float32`` or ``float16``.

    Returns:
        The prefix; its array may not be written to.

    Raises:
        PrefixFileError: the file is damaged in whatever way, or is of another key, model or element type.
        OSError: it cannot be opened or read.
    """
    with path.open("rb") as stream:
        preamble = _read(stream, _PREAMBLE.size, path)
        magic, version, header_bytes = _PREAMBLE.unpack(preamble)
        if magic != _MAGIC:
            raise PrefixFileError(f"{path} is not a file of keys and values")
        if version != FORMAT_VERSION:
            raise PrefixFileError(f"{path} has format {version}, this edge_llm reads format {FORMAT_VERSION}")
        if header_bytes > MAX_HEADER_BYTES:
            raise PrefixFileError(
                f"{path} has a header of {header_bytes} bytes, at most {MAX_HEADER_BYTES} are allowed"
            )
        raw_header = _read(stream, header_bytes, path)
        header = _decode_header(raw_header, path)
        _check_header(header, path, key, dims, kv_dtype)

        # Only now is the size known to be a sane one.
        shape = (header.tokens, header.layers, 2, header.kv_heads, header.head_dim)
        raw_ids = _read(stream, header.tokens * _TOKEN_ID.itemsize, path)
        there = os.fstat(stream.fileno()).st_size - stream.tell()
        kv_bytes = int(np.prod(shape)) * np.dtype(kv_dtype).itemsize
        if there != kv_bytes + _CHECKSUM_BYTES:
            state = "is truncated" if there < kv_bytes + _CHECKSUM_BYTES else "has bytes after its end"
            raise PrefixFileError(f"{path} {state}")
        kv = np.empty(shape, np.dtype(kv_dtype).newbyteorder("<"))
        raw_kv = kv.reshape(-1).view(np.uint8).data
        if stream.readinto(raw_kv) != kv_bytes:
            raise PrefixFileError(f"{path} is truncated")
        checksum = _read(stream, _CHECKSUM_BYTES, path)

    digest = hashlib.sha256(preamble + raw_header + raw_ids)
    digest.update(raw_kv)
    if digest.digest() != checksum:
        raise PrefixFileError(f"{path} does not match its checksum")
    token_ids = tuple(np.frombuffer(raw_ids, _TOKEN_ID).tolist())
    if max(token_ids) >= dims.vocab_size:
        raise PrefixFileError(f"{path} holds a token id outside the vocabulary of {dims.vocab_size}")
    kv.flags.writeable = False
    return PrefixKV(token_ids, kv)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of killed writers, none of a living one in any process; never raises ``OSError``.

    A writer holds a lock on its file, which the system releases when the process is gone.
    """
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            if _TEMPORARY_PATTERN.fullmatch(name):
                _remove_unlocked(folder / name)


def _create_temporary(path: Path) -> tuple[int, Path]:
    """A new, locked file beside ``path``: its descriptor and its name."""
    for _ in range(_CREATE_ATTEMPTS):
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        # A file system that knows no locks will do: nobody can take the file for a leftover there.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if temporary.exists():
            return descriptor, temporary
        # Somebody tidied up between the two calls above.
        os.close(descriptor)
    raise FileNotFoundError(f"temporary files vanish from {path.parent}")


def _write_all(descriptor: int, piece: bytes | memoryview) -> None:
    rest = memoryview(piece)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _remove_unlocked(temporary: Path) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(temporary)
        finally:
            os.close(descriptor)


def _read(stream: BinaryIO, count: int, path: Path) -> bytes:
    raw = stream.read(count)
    if len(raw) != count:
        raise PrefixFileError(f"{path} is truncated")
    return raw


def _decode_header(raw: bytes, path: Path) -> _Header:
    try:
        return msgspec.json.decode(raw, type=_Header)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise PrefixFileError(f"{path} has a header that is not valid: {error}") from None


def _check_header(header: _Header, path: Path, key: str, dims: ModelDims, kv_dtype: str) -> None:
    if header.key != key:
        raise PrefixFileError(f"{path} was made from another bundle, with other settings or on another machine")
    found = (header.layers, header.kv_heads, header.head_dim, header.dtype)
    expected = (dims.num_layers, dims.num_kv_heads, dims.head_dim, kv_dtype)
    if found != expected:
        raise PrefixFileError(f"{path} is for (layers, kv_heads, head_dim, dtype) {found}, this model has {expected}")
    if header.tokens > dims.max_seq_len:
        raise PrefixFileError(f"{path} holds {header.tokens} tokens, the context {dims.max_seq_len}")
