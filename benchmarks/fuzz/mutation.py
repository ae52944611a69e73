"""Real samples, damaged: as bytes, and along the structure of JSON, TOML and protocol buffers.

Plain damage seldom gets past a parser's first check. What keeps the structure reaches the checks behind it.
"""

from __future__ import annotations

import copy
import json
import re
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from random import Random

_MAX_PIECE_BYTES: Final = 40
_BYTES: Final = (0, 1, 0x0A, 0x22, 0x5C, 0x7B, 0x7F, 0x80, 0xC0, 0xFF)
TEXTS: Final = (
    "", " ", "\0", "\n[Service]\nExecStartPre=+/bin/true", "../../etc/passwd", "/etc/passwd", "a/b", "#", "+", "$share",
    "\u202e", "\ud800", "\U0001f697", "x" * 65, "x" * 5000, "%s%n", "*/_ORT_MEM_ADDR_/*", "'''", '"', "1e999",
    "edge_llm/v1/edge/reply/bob/x", "<|im_end|>", "null",
)  # fmt: skip
NUMBERS: Final = (
    0, 1, -1, 2, 63, 64, 255, 65_536, 2**24, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**400,
    0.0, -0.0, 0.5, 1e-320, 1e308, float("inf"), float("nan"),
)  # fmt: skip
_DEPTH: Final = 100_000
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


def damaged(raw: bytes, rng: Random) -> bytes:
    """Bits flipped, bytes replaced, pieces left out, put in or repeated, or the end cut off."""
    changed = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at, length = rng.randrange(len(changed) + 1), rng.randrange(1, _MAX_PIECE_BYTES)
        how = rng.randrange(6)
        if how == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            changed[at : at + 1] = bytes([rng.choice(_BYTES)])
        elif how == 2:
            del changed[at : at + length]
        elif how == 3:
            changed[at:at] = changed[at : at + length]
        elif how == 4:
            source = rng.randrange(len(changed) + 1)
            changed[at : at + length] = changed[source : source + length]
        elif rng.random() < 0.2:
            del changed[at:]
    return bytes(changed)


def odd_text(rng: Random, text: str = "") -> str:
    """A text that somebody may not have thought of, or ``text`` with one in it."""
    odd = rng.choice(TEXTS)
    if not text or rng.random() < 0.5:
        return odd
    at = rng.randrange(len(text) + 1)
    return text[:at] + odd + text[at + rng.randrange(3) :]


def odd_value(rng: Random, value: object = None) -> Any:
    """A JSON value in place of ``value``: often one of the same type, which gets further."""
    if isinstance(value, str) and rng.random() < 0.7:
        return odd_text(rng, value)
    if isinstance(value, int | float) and rng.random() < 0.7:
        return rng.choice((*NUMBERS, value + 1, value - 1, -value, value * 1000))
    return rng.choice((None, True, False, [], {}, [[]], {"": None}, odd_text(rng), rng.choice(NUMBERS)))


def restated_tree(tree: Any, rng: Random) -> Any:
    """A copy of a JSON value with some values replaced, left out, repeated, renamed or moved."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        node, key = _place(tree, rng)
        if node is None:
            return odd_value(rng, tree)
        how = rng.randrange(6)
        if how <= 1:
            node[key] = odd_value(rng, node[key])
        elif how == 2:
            del node[key]
        elif how == 3:
            other, other_key = _place(tree, rng)
            node[key] = copy.deepcopy(other[other_key])
        elif isinstance(node, list):
            node *= 2
        else:
            node[odd_text(rng, str(key))] = node[key]
    return tree


def restated_json(raw: bytes, rng: Random) -> bytes:
    """JSON that says nearly the same, seldom nested far too deeply, and sometimes damaged as bytes."""
    how = rng.random()
    if how < 0.25:
        return damaged(raw, rng)
    if how < 0.27:
        at = rng.choice([found.end() for found in re.finditer(rb"[:\[]", raw)] or [0])
        return raw[:at] + rng.choice((b"[", b'{"a":')) * _DEPTH + raw[at:]
    return json.dumps(restated_tree(json.loads(raw), rng), ensure_ascii=False).encode("utf-8", "surrogatepass")


def restated_toml(raw: bytes, rng: Random) -> bytes:
    """TOML with lines left out, repeated, moved, or set to something else, and sometimes damaged as bytes."""
    if rng.random() < 0.25:
        return damaged(raw, rng)
    lines = raw.decode().splitlines()
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(lines))
        key, equals, value = lines[at].partition(" = ")
        how = rng.randrange(6)
        if equals and how <= 2:
            lines[at] = f"{key} = {_odd_toml(rng, value)}"
        elif equals and how == 3:
            lines[at] = f"{odd_text(rng, key)} = {value}"
        elif how == 4:
            del lines[at]
        else:
            lines.insert(rng.randrange(len(lines) + 1), lines[at])
        lines = lines or [""]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def restated_protobuf(raw: bytes, rng: Random) -> bytes:
    """A protocol buffer with one field changed, left out or repeated; the lengths around it are made right again.

    See "Encoding" in the documentation of protocol buffers.
    """
    fields = _protobuf_fields(raw)
    if not fields:
        return damaged(raw, rng) if raw else bytes([rng.choice(_BYTES)])
    start, content, end, wire_type = rng.choice(fields)
    piece = raw[start:end]
    how = rng.randrange(10)
    if how == 0:
        piece = b""
    elif how == 1:
        piece *= 2
    elif wire_type == _VARINT:
        piece = raw[start:content] + _varint(rng.choice([n for n in NUMBERS if isinstance(n, int)]) % 2**64)
    elif wire_type == _LENGTH:
        tag_end = _after_varint(raw, start)
        inner = raw[content:end]
        if _protobuf_fields(inner) and rng.random() < 0.9:
            inner = restated_protobuf(inner, rng)
        elif rng.random() < 0.5:
            inner = odd_text(rng).encode("utf-8", "surrogatepass")
        else:
            inner = damaged(inner, rng)
        piece = raw[start:tag_end] + _varint(len(inner)) + inner
    else:
        piece = raw[start:content] + rng.randbytes(end - content)
    return raw[:start] + piece + raw[end:]


def _place(tree: Any, rng: Random) -> tuple[Any, Any]:
    """A container in a JSON value and a key of it; the deeper, the less likely. (None, None) if there is none."""
    node, key = None, None
    while isinstance(tree, dict | list) and tree and (node is None or rng.random() < 0.7):
        node, key = tree, rng.choice(list(tree)) if isinstance(tree, dict) else rng.randrange(len(tree))
        tree = node[key]
    return node, key


def _odd_toml(rng: Random, value: str) -> str:
    try:
        known = json.loads(value)
    except (ValueError, RecursionError):
        known = None
    odd = odd_value(rng, known)
    if rng.random() < 0.02:
        return "[" * _DEPTH
    if isinstance(odd, float):
        return str(odd)
    return json.dumps({"a": 1} if isinstance(odd, dict) else odd).replace(":", " =")


def _protobuf_fields(raw: bytes) -> list[tuple[int, int, int, int]]:
    """(start, start of the content, end, wire type) of each field; empty if it is no message, or an empty one."""
    fields, position = [], 0
    while position < len(raw):
        start = position
        position = _after_varint(raw, start)
        wire_type, number = raw[start] & 7, raw[start] >> 3
        content = position
        if wire_type == _VARINT:
            end = _after_varint(raw, content)
        elif wire_type == _LENGTH:
            content = _after_varint(raw, position)
            end = content + _varint_value(raw[position:content])
        else:
            end = content + {_FIXED64: 8, _FIXED32: 4}.get(wire_type, len(raw) + 1)
        if end > len(raw) or (number == 0 and position == start + 1):
            return []
        fields.append((start, content, end, wire_type))
        position = end
    return fields


def _after_varint(raw: bytes, position: int) -> int:
    while position < len(raw) and raw[position] & 0x80:
        position += 1
    return position + 1


def _varint_value(raw: bytes) -> int:
    return sum((byte & 0x7F) << (7 * index) for index, byte in enumerate(raw))


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])
