from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edge_llm.cache.prefix_cache import MAX_NODE_TOKENS, PrefixCache
from edge_llm.engine.kv_cache import KVCache
from edge_llm.errors import CacheIntegrityError
from tests.fakes import FakeRunner

DIMS = FakeRunner(max_seq_len=300).dims
TOKEN_NBYTES = KVCache(DIMS, 1).token_nbytes
SHARED = [1, 2, 3, 4, 5]


def rows_of(token_ids):
    """KV that tells which token it is of, and of which position."""
    kv = np.zeros((len(token_ids), DIMS.num_layers, 2, DIMS.num_kv_heads, DIMS.head_dim), np.float32)
    for position, token_id in enumerate(token_ids):
        kv[position] = token_id * 1000 + position
    return kv


def shared_len(token_ids, shared=SHARED):
    count = 0
    for left, right in zip(token_ids, shared, strict=False):
        if left != right:
            break
        count += 1
    return count


def insert(cache, user, token_ids, **fields):
    kv = rows_of(token_ids)
    return cache.insert_prefix(
        user, token_ids, shared_len(token_ids), lambda start, stop: kv[start:stop].copy(), **fields
    )


def match(cache, user, token_ids):
    return cache.match_prefix(user, token_ids, shared_len(token_ids))


def make(max_bytes=1 << 20, max_entries=1000):
    return PrefixCache(TOKEN_NBYTES, max_bytes, max_entries)


def test_what_was_inserted_is_matched_and_written_where_it_belongs():
    cache = make()
    token_ids = list(range(10, 210))
    assert insert(cache, "ann", token_ids) == 200
    found = match(cache, "ann", [*token_ids[:150], 9999])
    assert (found.length, found.origin) == (150, "tree")
    slots = KVCache(DIMS, 2)
    found.write_to(slots, 1, 3, 149)
    written = slots.read_rows(1, 0, 151)
    np.testing.assert_array_equal(written[3:149], rows_of(token_ids)[3:149])
    assert not written[:3].any()
    assert not written[149:].any()
    np.testing.assert_array_equal(found.rows(), rows_of(token_ids)[:150])


def test_the_longest_match_is_found_and_not_a_good_enough_one():
    cache = make()
    insert(cache, "ann", [7, 8, 9, 10])
    insert(cache, "ann", [7, 8, 20, 21, 22])
    insert(cache, "ann", [7, 8, 20, 21, 30])
    assert match(cache, "ann", [7, 8, 20, 21, 30, 31]).length == 5
    assert match(cache, "ann", [7, 8, 20, 99]).length == 3
    assert match(cache, "ann", [8]).length == 0
    cache.check_integrity()


def test_only_what_is_missing_is_read():
    cache = make()
    insert(cache, "ann", [7, 8, 9])
    read = []

    def rows(start, stop):
        read.append((start, stop))
        return rows_of([7, 8, 9, 10, 11])[start:stop]

    cache.insert_prefix("ann", [7, 8, 9, 10, 11], 0, rows)
    assert read == [(3, 5)]


def test_users_share_the_head_and_nothing_else():
    cache = make()
    insert(cache, "ann", [*SHARED, 70, 71, 72])
    assert match(cache, "ann", [*SHARED, 70, 71, 72]).length == 8
    assert match(cache, "bob", [*SHARED, 70, 71, 72]).length == len(SHARED)
    insert(cache, "ann", [50, 51, 52])
    assert match(cache, "ann", [50, 51, 52]).length == 3
    assert match(cache, "bob", [50, 51, 52]).length == 0
    cache.check_integrity()


def test_a_part_of_the_head_is_shared_too():
    cache = make()
    insert(cache, None, SHARED)
    token_ids = [*SHARED[:3], 60, 61]  # leaves the head after three tokens
    insert(cache, "ann", token_ids)
    assert match(cache, "ann", token_ids).length == 5
    assert match(cache, "bob", token_ids).length == 3
    assert match(cache, "bob", SHARED).length == 5
    cache.check_integrity()


def test_the_least_recently_used_leaf_goes_first():
    cache = make(max_entries=3)
    for first in (10, 20, 30):
        insert(cache, "ann", [first, first + 1])
    match(cache, "ann", [10, 11])
    insert(cache, "ann", [40, 41])
    assert [match(cache, "ann", [first, first + 1]).length for first in (10, 20, 30, 40)] == [2, 0, 2, 2]
    assert cache.evicted == 1


def test_a_long_prefix_loses_its_end_first():
    node_bytes = MAX_NODE_TOKENS * (TOKEN_NBYTES + 40) + 1024
    cache = make(max_bytes=3 * node_bytes)
    token_ids = list(range(3 * MAX_NODE_TOKENS))
    assert insert(cache, "ann", token_ids) == len(token_ids)
    insert(cache, "ann", list(range(1000, 1000 + MAX_NODE_TOKENS)))
    assert match(cache, "ann", token_ids).length == 2 * MAX_NODE_TOKENS
    cache.check_integrity()


def test_pinned_and_locked_nodes_stay():
    cache = make(max_entries=2)
    insert(cache, None, SHARED)
    cache.pin(match(cache, None, SHARED))
    insert(cache, "ann", [10, 11])
    locked = match(cache, "ann", [10, 11])
    cache.lock(locked)
    assert insert(cache, "ann", [20, 21]) == 0
    assert insert(cache, "ann", [10, 15]) == 1  # a locked node is not split
    cache.unlock(locked)
    assert insert(cache, "ann", [20, 21]) == 2
    assert match(cache, "bob", SHARED).length == len(SHARED)
    cache.clear()
    assert cache.entries == 1
    cache.reset()
    assert cache.nbytes == cache.entries == 0


def test_one_user_can_be_forgotten():
    cache = make()
    insert(cache, "ann", [*SHARED, 70, 71])
    insert(cache, "bob", [*SHARED, 70, 71])
    cache.clear("ann")
    assert match(cache, "ann", [*SHARED, 70, 71]).length == len(SHARED)
    assert match(cache, "bob", [*SHARED, 70, 71]).length == 7
    cache.check_integrity()


def test_too_little_room_keeps_what_fits_and_stays_within_it():
    cache = make(max_bytes=TOKEN_NBYTES * 10)
    assert insert(cache, "ann", list(range(100, 200))) == 0
    cache = make(max_bytes=MAX_NODE_TOKENS * (TOKEN_NBYTES + 40) + 1024)
    assert insert(cache, "ann", list(range(100, 200))) == MAX_NODE_TOKENS
    cache.check_integrity()


def test_damage_is_found():
    cache = make()
    insert(cache, "ann", [10, 11, 12])
    cache.nbytes += 1
    with pytest.raises(CacheIntegrityError, match="bytes"):
        cache.check_integrity()


TOKENS = st.lists(st.integers(1, 6), min_size=1, max_size=14)
USERS = st.sampled_from(["ann", "bob"])


class PrefixCacheMachine(RuleBasedStateMachine):
    """Against plain sets of prefixes: never more than was inserted, and all of it while nothing is evicted."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = make(max_bytes=30 * (TOKEN_NBYTES + 1100), max_entries=12)
        self.known: dict[str | None, set[tuple[int, ...]]] = {"ann": set(), "bob": set(), None: set()}
        self.locked: list = []

    @rule(user=USERS, token_ids=TOKENS)
    def insert(self, user, token_ids):
        held = insert(self.cache, user, token_ids)
        assert held <= len(token_ids)
        assert match(self.cache, user, token_ids).length == held
        for end in range(1, len(token_ids) + 1):
            shared = end <= shared_len(token_ids)
            self.known[None if shared else user].add(tuple(token_ids[:end]))

    @rule(user=USERS, token_ids=TOKENS)
    def match(self, user, token_ids):
        found = match(self.cache, user, token_ids)
        prefix = token_ids[: found.length]
        for end in range(1, found.length + 1):
            assert tuple(prefix[:end]) in self.known[user] | self.known[None]
        if found.length:
            np.testing.assert_array_equal(found.rows(), rows_of(prefix))
        if not self.cache.evicted and not self.locked:
            longest = 0
            while longest < len(token_ids) and tuple(token_ids[: longest + 1]) in self.known[user] | self.known[None]:
                longest += 1
            assert found.length >= longest

    @rule(user=USERS, token_ids=TOKENS)
    def lock(self, user, token_ids):
        found = match(self.cache, user, token_ids)
        if found.length:
            self.cache.lock(found)
            self.locked.append((found, token_ids[: found.length]))

    @precondition(lambda self: self.locked)
    @rule()
    def unlock(self):
        found, prefix = self.locked.pop()
        np.testing.assert_array_equal(found.rows(), rows_of(prefix))
        self.cache.unlock(found)

    @rule(user=USERS)
    def forget(self, user):
        self.cache.clear(user)
        self.cache.evicted += 1

    @invariant()
    def sound(self):
        self.cache.check_integrity()


TestPrefixCacheMachine = PrefixCacheMachine.TestCase
TestPrefixCacheMachine.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


@settings(deadline=None)
@given(st.lists(st.tuples(USERS, st.lists(st.integers(1, 4), min_size=1, max_size=200)), max_size=12))
def test_the_bounds_hold_while_inserting(inserts):
    cache = make(max_bytes=40_000, max_entries=5)
    for user, token_ids in inserts:
        kv = rows_of(token_ids)

        def read(start, stop, kv=kv):
            # Room has been made before anything is copied.
            assert cache.nbytes + (stop - start) * TOKEN_NBYTES <= cache.max_bytes
            return kv[start:stop].copy()

        cache.insert_prefix(user, token_ids, shared_len(token_ids), read)
        assert cache.nbytes <= cache.max_bytes
        assert cache.entries <= cache.max_entries
