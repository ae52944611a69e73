"""Before ONNX Runtime sees a graph: it may read its own data file, and nothing else.

A graph names files that hold its weights. Up to 1.23 at least, ONNX Runtime opens whatever is named, and takes one
special name for an address in memory (1.31 refuses both). Only what can name a file is looked at here, in the protocol
buffer as it is: field numbers are those of onnx.proto.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Final

from edge_llm.errors import BundleIntegrityError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# By message, the fields that hold messages of interest.
_FIELDS: Final[dict[str, dict[int, str]]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TensorProto": {13: "StringStringEntryProto"},
}
_NODE_OP_TYPE: Final = 4
_ENTRY_KEY: Final = 1
_ENTRY_VALUE: Final = 2
# An operator whose attributes name a compiled engine, which a provider loads and runs as code.
_ENGINE_OP: Final = b"EPContext"
# A GPT-2 has some ten thousand; each takes about a microsecond.
MAX_FIELDS: Final = 2_000_000
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_VARINT_BYTES: Final = 10


def check_graph_file(path: Path, data_name: str | None) -> None:
    """See that a graph reads no file but the one beside it whose name is ``data_name``, or none if that is None.

    Raises:
        BundleIntegrityError: it names another file or an engine, or it is no ONNX graph.
    """
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
            _check(mapping, None if data_name is None else data_name.encode())
    except (_RefusedError, ValueError, OSError) as error:  # an empty file cannot be mapped
        raise BundleIntegrityError(f"{path} is not used: {error or 'it is empty'}") from None


class _RefusedError(Exception):
    """Why a graph is not used."""


def _check(data: mmap.mmap, data_name: bytes | None) -> None:
    """Look through all messages; on a stack of its own, so that no nesting is too deep."""
    waiting = [("ModelProto", 0, len(data))]
    count = 0
    while waiting:
        message, start, stop = waiting.pop()
        children = _FIELDS[message]
        for field, first, last in _fields(data, start, stop):
            count += 1
            if count > MAX_FIELDS:
                raise _RefusedError(f"it has more than {MAX_FIELDS} parts")
            child = children.get(field)
            if child == "StringStringEntryProto":
                _check_entry(data, first, last, data_name)
            elif child is not None:
                waiting.append((child, first, last))
            elif message == "NodeProto" and field == _NODE_OP_TYPE and data[first:last] == _ENGINE_OP:
                raise _RefusedError("it holds a compiled engine (EPContext)")


def _check_entry(data: mmap.mmap, start: int, stop: int, data_name: bytes | None) -> None:
    """One entry of a tensor's ``external_data``: where it lies, from where on, how much."""
    key = value = b""
    for field, first, last in _fields(data, start, stop):
        if field == _ENTRY_KEY:
            key = data[first:last]
        elif field == _ENTRY_VALUE:
            value = data[first:last]
    if key == b"location" and value != data_name:
        allowed = "none" if data_name is None else repr(data_name.decode())
        raise _RefusedError(f"it reads the file {value[:200]!r}, the manifest allows {allowed}")


def _fields(data: mmap.mmap, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Number, start and end of each field of a message; an empty range for one that holds no bytes."""
    position = start
    while position < stop:
        tag, position = _varint(data, position, stop)
        field, wire_type = tag >> 3, tag & 7
        first = position
        if wire_type == _VARINT:
            _, position = _varint(data, position, stop)
            first = position
        elif wire_type == _BYTES:
            length, first = _varint(data, position, stop)
            position = first + length
        elif wire_type in (_FIXED64, _FIXED32):
            first = position = position + (8 if wire_type == _FIXED64 else 4)
        else:
            raise _RefusedError("it is no ONNX graph")
        if position > stop or field == 0:
            raise _RefusedError("it is damaged, or no ONNX graph")
        yield field, first, position


def _varint(data: mmap.mmap, position: int, stop: int) -> tuple[int, int]:
    """A number in base 128, the lowest digit first, and the position behind it."""
    value = 0
    for index in range(_MAX_VARINT_BYTES):
        if position >= stop:
            break
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, position
    raise _RefusedError("it is damaged, or no ONNX graph")
