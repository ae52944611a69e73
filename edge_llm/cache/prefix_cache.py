"""A radix tree over token ids: the keys and values of prompts, so that what was prefilled once is not prefilled again.

Every node holds a run of tokens and their KV, ``(tokens, layers, 2, kv_heads, head_dim)``. A path from the root spells
a prefix. Below what all users share, a node belongs to one user: its key under the parent is (user, first token), so
that nobody can hit, or time, another's words.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import numpy as np

from edge_llm.engine.kv_cache import lazy_zeros
from edge_llm.engine.prompt import common_prefix_length
from edge_llm.errors import CacheIntegrityError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from edge_llm.engine.kv_cache import KVCache

    # KV of the tokens from one position to another, the caller's own from then on.
    ReadRows: TypeAlias = Callable[[int, int], NDArray[Any]]

# A node has at most so many tokens: a long prompt can lose its end without losing all of it.
MAX_NODE_TOKENS: Final = 64
# What a node costs beside its KV: the object, its token ids, its place in the parent. An estimate from above.
_NODE_OVERHEAD_BYTES: Final = 1024
_TOKEN_OVERHEAD_BYTES: Final = 40

Origin = Literal["tree", "snapshot", "bundle"]
Key: TypeAlias = tuple["str | None", int]


@dataclass(eq=False)
class _Node:
    parent: _Node | None
    user: str | None
    token_ids: list[int]
    kv: Any
    origin: Origin
    pinned: bool = False
    locks: int = 0
    used_at: int = 0
    children: dict[Key, _Node] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        return self.user, self.token_ids[0]

    @property
    def nbytes(self) -> int:
        return int(self.kv.nbytes) + _overhead(len(self.token_ids))

    @property
    def evictable(self) -> bool:
        return not (self.children or self.pinned or self.locks)


@dataclass(frozen=True)
class PrefixMatch:
    """The longest cached prefix of a prompt.

    Attributes:
        length: in tokens.
        origin: where its last part comes from: ``tree``, ``snapshot`` or ``bundle``; None if there is no match.
    """

    length: int
    origin: Origin | None
    _parts: tuple[tuple[_Node, int], ...]

    def rows(self) -> NDArray[Any]:
        """The KV of the whole prefix in one piece: ``(tokens, layers, 2, kv_heads, head_dim)``, the caller's own."""
        return np.concatenate([node.kv[:count] for node, count in self._parts])

    def write_to(self, cache: KVCache, slot: int, start: int, stop: int) -> None:
        """Put the KV of the tokens ``start`` to ``stop`` into a slot; every byte moves once."""
        position = 0
        for node, count in self._parts:
            first, last = max(start - position, 0), min(stop - position, count)
            if first < last:
                cache.write_rows(slot, position + first, node.kv[first:last])
            position += count


class PrefixCache:
    """Prefixes by token ids, least recently used leaves given up first. Not thread-safe.

    ``shared_len`` below is how many of a prompt's leading tokens are not any user's words (a system prompt that
    everybody has); it must depend on the tokens alone.

    Args:
        token_nbytes: KV bytes of one token.
        max_bytes: bound on the KV and the estimated cost of the nodes; never passed, not even for a moment.
        max_entries: bound on the nodes.
    """

    def __init__(self, token_nbytes: int, max_bytes: int, max_entries: int) -> None:
        self._token_nbytes = token_nbytes
        self.max_bytes = max_bytes
        self.max_entries = max_entries
        self.nbytes = 0
        self.entries = 0
        self.evicted = 0
        self._root = _Node(None, None, [], None, "tree")
        self._clock = 0

    def match_prefix(self, user: str | None, token_ids: Sequence[int], shared_len: int) -> PrefixMatch:
        """The longest prefix that ``user`` may have; marks it as just used."""
        parts = self._walk(user, list(token_ids), shared_len)
        self._touch(parts)
        return PrefixMatch(sum(count for _, count in parts), parts[-1][0].origin if parts else None, tuple(parts))

    def insert_prefix(
        self,
        user: str | None,
        token_ids: Sequence[int],
        shared_len: int,
        read_rows: ReadRows,
        *,
        origin: Origin = "tree",
    ) -> int:
        """Keep a prefix; only what is missing is read.

        Args:
            user: whose words come after the shared part; None when all of it is shared.
            token_ids: the whole prefix, from the start of the prompt.
            shared_len: see the class.
            read_rows: gives the KV of a range of its positions.
            origin: what a later match reports.

        Returns:
            How many of the tokens are cached now: less than all of them when there is no room.
        """
        tokens = list(token_ids)
        parts = self._walk(user, tokens, shared_len)
        self._touch(parts)
        length = sum(count for _, count in parts)
        node = parts[-1][0] if parts else self._root
        held = [part for part, _ in parts]
        for part in held:
            part.locks += 1
        try:
            partly = bool(parts) and parts[-1][1] < len(node.token_ids)
            if partly and length < len(tokens) and not self._split(node, parts[-1][1]):
                return length
            while length < len(tokens):
                end = shared_len if length < shared_len else len(tokens)
                stop = min(length + MAX_NODE_TOKENS, end)
                scope = None if length < shared_len else user
                child = self._append(node, scope, tokens[length:stop], (read_rows, length), origin)
                if child is None:
                    return length
                child.locks += 1
                held.append(child)
                node, length = child, stop
        finally:
            for part in held:
                part.locks -= 1
        return length

    def pin(self, match: PrefixMatch) -> None:
        """Never give up a match's nodes."""
        for node, _ in match._parts:
            node.pinned = True

    def lock(self, match: PrefixMatch) -> None:
        """Keep a match's nodes until ``unlock``: they are neither given up nor split."""
        for node, _ in match._parts:
            node.locks += 1

    def unlock(self, match: PrefixMatch) -> None:
        """Undo one ``lock``."""
        for node, _ in match._parts:
            assert node.locks > 0, "unlocked more often than locked"
            node.locks -= 1

    def clear(self, user: str | None = None) -> None:
        """Forget one user's nodes, or everything that is neither pinned nor locked."""
        for node in reversed(list(self._nodes())):
            if node.evictable and (user is None or node.user == user):
                self._remove(node)

    def reset(self, token_nbytes: int | None = None) -> None:
        """Forget everything, whatever holds it: after a failed ``check_integrity``, or when another engine goes on."""
        self._token_nbytes = token_nbytes or self._token_nbytes
        self._root.children.clear()
        self.nbytes = self.entries = 0

    def check_integrity(self) -> None:
        """Raises ``CacheIntegrityError`` when the tree contradicts itself or its bounds."""
        nbytes = entries = 0
        for node in self._nodes():
            entries += 1
            nbytes += node.nbytes
            parent = node.parent
            _require(parent is not None and parent.children.get(node.key) is node, "a node is not its parent's child")
            _require(0 < len(node.token_ids) <= MAX_NODE_TOKENS, "a node has no tokens, or too many")
            _require(len(node.kv) == len(node.token_ids), "a node's KV is not as long as its tokens")
            _require(node.locks >= 0, "a node was unlocked too often")
            if parent is not None and parent.user is not None:
                _require(node.user == parent.user, "a node below a user's words is not that user's")
        _require(entries == self.entries, f"{entries} nodes, {self.entries} counted")
        _require(nbytes == self.nbytes, f"{nbytes} bytes, {self.nbytes} counted")
        _require(nbytes <= self.max_bytes and entries <= self.max_entries, "the cache is over its bounds")

    def _walk(self, user: str | None, tokens: list[int], shared_len: int) -> list[tuple[_Node, int]]:
        """The nodes along ``tokens``, with how many tokens of each match; only the last may match in part."""
        parts = []
        node, position = self._root, 0
        while position < len(tokens):
            shared = position < shared_len
            child = node.children.get((None if shared else user, tokens[position]))
            if child is None:
                break
            end = position + len(child.token_ids)
            # A node of the shared part may go on beyond what is shared with this prompt.
            limit = min(end, shared_len) if shared else end
            count = common_prefix_length(child.token_ids, tokens[position:limit])
            parts.append((child, count))
            position += count
            if count < len(child.token_ids):
                break
            node = child
        return parts

    def _touch(self, parts: Sequence[tuple[_Node, int]]) -> None:
        self._clock += 1
        for node, _ in parts:
            node.used_at = self._clock

    def _append(
        self, parent: _Node, user: str | None, token_ids: list[int], rows: tuple[ReadRows, int], origin: Origin
    ) -> _Node | None:
        """A new leaf, or None if there is no room. Room is made before the KV is copied."""
        if not self._make_room(self._token_nbytes * len(token_ids) + _overhead(len(token_ids))):
            return None
        read, start = rows
        node = _Node(parent, user, token_ids, read(start, start + len(token_ids)), origin, used_at=self._clock)
        self._link(node)
        return node

    def _split(self, node: _Node, count: int) -> bool:
        """Make a node's first ``count`` tokens a node of their own, above the rest. False if there is no room.

        Both halves are copied, since views would keep the whole alive: for that moment both must fit beside it.
        """
        # The caller holds one lock itself; another holder relies on the node as it is.
        if node.locks > 1 or not self._make_room(node.nbytes + _NODE_OVERHEAD_BYTES):
            return False
        whole = node.kv
        lower = _Node(node, node.user, node.token_ids[count:], _copy(whole[count:]), node.origin, node.pinned)
        lower.used_at = node.used_at
        lower.children = node.children
        for child in lower.children.values():
            child.parent = lower
        self.nbytes -= node.nbytes
        node.token_ids, node.kv, node.children = node.token_ids[:count], _copy(whole[:count]), {}
        self.nbytes += node.nbytes
        self._link(lower)
        return True

    def _link(self, node: _Node) -> None:
        assert node.parent is not None
        node.parent.children[node.key] = node
        self.nbytes += node.nbytes
        self.entries += 1

    def _remove(self, node: _Node) -> None:
        assert node.parent is not None
        del node.parent.children[node.key]
        self.nbytes -= node.nbytes
        self.entries -= 1

    def _make_room(self, nbytes: int) -> bool:
        """Give up leaves, least recently used first, until one more node of ``nbytes`` fits. False if it cannot."""
        if nbytes > self.max_bytes:
            return False

        def fits() -> bool:
            return self.nbytes + nbytes <= self.max_bytes and self.entries < self.max_entries

        if fits():
            return True
        leaves = [(node.used_at, id(node), node) for node in self._nodes() if node.evictable]
        heapq.heapify(leaves)
        while leaves and not fits():
            _, _, node = heapq.heappop(leaves)
            self._remove(node)
            self.evicted += 1
            parent = node.parent
            if parent is not None and parent is not self._root and parent.evictable:
                heapq.heappush(leaves, (parent.used_at, id(parent), parent))
        return fits()

    def _nodes(self) -> Iterator[_Node]:
        """Every node, parents before their children."""
        waiting = list(self._root.children.values())
        while waiting:
            node = waiting.pop()
            yield node
            waiting.extend(node.children.values())


def _copy(rows: NDArray[Any]) -> NDArray[Any]:
    copy = lazy_zeros(rows.shape, rows.dtype)
    copy[:] = rows
    return copy


def _overhead(tokens: int) -> int:
    return _NODE_OVERHEAD_BYTES + _TOKEN_OVERHEAD_BYTES * tokens


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise CacheIntegrityError(f"the prefix cache is damaged: {problem}")
