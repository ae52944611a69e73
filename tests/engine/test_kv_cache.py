from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_llm.engine.kv_cache import KVCache, SlotPool
from edge_llm.errors import NoFreeSlotError
from tests.fakes import FakeRunner


def test_sizes():
    cache = KVCache(FakeRunner(max_seq_len=100).dims, slots=3)
    assert cache.nbytes == 2 * 3 * 100 * 8 * 4
    assert cache.slots == 3


def test_copy_row_copies_only_the_valid_part():
    cache = KVCache(FakeRunner(max_seq_len=10).dims, slots=2)
    for key, value in cache.layers:
        key[0], value[0] = 1.0, 2.0
    cache.copy_row(0, 1, 4)
    key, value = cache.layers[0]
    assert np.all(key[1, :, :4] == 1.0)
    assert np.all(value[1, :, :4] == 2.0)
    assert np.all(key[1, :, 4:] == 0.0)


def test_slots_are_handed_out_lowest_first():
    pool = SlotPool(3)
    assert [pool.acquire() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(NoFreeSlotError):
        pool.acquire()
    pool.release(1)
    assert pool.acquire() == 1


@given(
    st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.sampled_from("fdp"), min_size=n, max_size=n)))
)
def test_compaction_never_touches_a_row_that_is_held(case):
    slots, kinds = case
    pool = SlotPool(slots)
    for _ in range(slots):
        pool.acquire()
    for row, kind in enumerate(kinds):
        if kind == "f":
            pool.release(row)
    rows = {row for row, kind in enumerate(kinds) if kind == "d"}
    moves = pool.compaction(rows) if rows else []
    after = set(rows)
    for source, target in moves:
        assert kinds[source] == "d"
        assert kinds[target] == "f"
        pool.move(source, target)
        after = (after - {source}) | {target}
    assert len(after) == len(rows)
    if moves:
        assert max(after) - min(after) == len(after) - 1
