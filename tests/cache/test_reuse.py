from __future__ import annotations

import pytest

from edge_llm.cache.prefix_cache import PrefixCache
from edge_llm.cache.reuse import PrefixReuse
from edge_llm.engine.sampler import SamplingParams
from edge_llm.errors import NoFreeSlotError
from edge_llm.metrics import Metrics
from tests.fakes import FakeRunner, fake_engine

HEAD = [300 % 256, *range(1, 20)]
GREEDY = SamplingParams()


class Bench:
    """An engine of fakes with its caches."""

    def __init__(self, slots: int = 3, tree: bool = True, max_bytes: int = 1 << 20) -> None:
        self.runner = FakeRunner(slots, max_seq_len=256)
        self.engine = fake_engine(self.runner)
        self.metrics = Metrics()
        cache = PrefixCache(self.runner.cache.token_nbytes, max_bytes, 100) if tree else None
        self.reuse = PrefixReuse(self.engine, cache, [HEAD], self.metrics)

    def run(self, user: str, token_ids: list[int], *, release: bool = True, **fields):
        started = self.reuse.start(user, token_ids, GREEDY, 4, **fields)
        state = started.state
        assert self.runner.rows[state.slot, : state.reused_len].tolist() == token_ids[: state.reused_len]
        while not state.prefilled:
            self.engine.prefill(state)
        while not state.finished:
            self.engine.decode([state])
        if release:
            self.reuse.release(started)
        return started


def prompt(*tail: int) -> list[int]:
    return [*HEAD, *tail]


def test_a_slot_that_holds_the_longest_prefix_is_used_in_place():
    bench = Bench()
    first = bench.run("ann", prompt(50, 51, 52, 53))
    again = bench.run("ann", prompt(50, 51, 52, 60, 61))
    assert again.state.slot == first.state.slot
    assert (again.state.reused_len, again.cached_from) == (len(HEAD) + 3, "slot")


def test_the_same_prompt_again_computes_two_tokens():
    bench = Bench()
    bench.run("ann", prompt(50, 51))
    bench.runner.runs.clear()
    assert bench.run("ann", prompt(50, 51)).state.reused_len == len(HEAD)
    assert bench.runner.runs[0] == ("prefill", 2)


def test_rows_that_decode_has_computed_are_not_kept():
    bench = Bench()
    answer = bench.run("ann", prompt(50, 51)).state.output_ids
    again = bench.run("ann", prompt(50, 51, *answer, 60, 61))
    assert again.state.reused_len == len(HEAD) + 2


def test_another_user_gets_the_head_in_a_slot_of_their_own():
    bench = Bench()
    first = bench.run("ann", prompt(50, 51, 52, 53))
    bench.reuse.save_one()
    other = bench.run("bob", prompt(50, 51, 52, 53))
    assert other.state.slot != first.state.slot
    assert (other.state.reused_len, other.cached_from) == (len(HEAD), "tree")
    # The positive half: the user's own words are still there.
    assert bench.run("ann", prompt(50, 51, 52, 53)).state.reused_len == len(HEAD) + 2


@pytest.mark.parametrize("tree", [True, False])
def test_another_user_gets_the_head_before_it_was_saved(tree):
    bench = Bench(tree=tree)
    bench.run("ann", prompt(50, 51, 52, 53))
    other = bench.run("bob", prompt(50, 51, 52, 53))
    assert (other.state.reused_len, other.cached_from) == (len(HEAD), "slot")


def test_what_is_overwritten_is_saved_first():
    bench = Bench(slots=1)
    words = list(range(60, 80))
    bench.run("ann", prompt(*words))
    bench.run("bob", prompt(99, 98, 97))
    again = bench.run("ann", prompt(*words))
    assert (again.state.reused_len, again.cached_from) == (len(HEAD) + len(words) - 2, "tree")


def test_bypass_neither_finds_nor_leaves_anything():
    bench = Bench()
    bench.run("ann", prompt(50, 51, 52, 53))
    assert bench.run("ann", prompt(50, 51, 52, 53), bypass=True).state.reused_len == 0


def test_switched_off_every_prompt_starts_cold():
    bench = Bench()
    bench.reuse.enabled = False
    bench.run("ann", prompt(50, 51))
    assert bench.run("ann", prompt(50, 51)).state.reused_len == 0
    assert bench.reuse.warm("ann", prompt(50, 51), 16) == 0


def test_warming_goes_chunk_by_chunk_and_leaves_no_chunk_of_one():
    bench = Bench()
    bench.run("cat", prompt(90, 91))
    bench.reuse.save_one()
    target = prompt(*range(50, 61))
    computed = []
    while count := bench.reuse.warm("ann", target, 4, expires_at=100.0):
        computed.append(count)
    assert sum(computed) == 11
    assert min(computed) >= 2
    assert max(computed) <= 4
    started = bench.run("ann", [*target, 70, 71])
    assert (started.state.reused_len, started.cached_from) == (len(target), "partial")
    assert bench.metrics.counter("prefetch_tokens_computed") == 11
    assert bench.metrics.counter("prefetch_tokens_used") == 11
    assert bench.metrics.counter("prefetch_tokens_wasted") == 0


def test_a_revision_rewinds_to_what_is_common():
    bench = Bench()
    while bench.reuse.warm("ann", prompt(50, 51, 52, 53, 54), 16, expires_at=100.0):
        pass
    assert bench.reuse.warm("ann", prompt(50, 51, 62, 63), 16, expires_at=100.0) == 2
    assert bench.metrics.counter("prefetch_tokens_wasted") == 3
    assert bench.run("ann", prompt(50, 51, 62, 63, 64, 65)).state.reused_len == len(HEAD) + 4


def test_a_single_new_token_waits_for_company():
    bench = Bench()
    while bench.reuse.warm("ann", prompt(50, 51), 16, expires_at=100.0):
        pass
    assert bench.reuse.warm("ann", prompt(50, 51, 52), 16, expires_at=100.0) == 0
    assert bench.reuse.warm("ann", prompt(50, 51, 52, 53), 16, expires_at=100.0) == 2


def test_a_single_last_token_is_computed_with_the_one_before_it():
    bench = Bench()
    while bench.reuse.warm("ann", prompt(50, 51), 16, expires_at=100.0):
        pass
    assert bench.reuse.warm("ann", prompt(50, 51, 52), 16, expires_at=100.0, to_the_end=True) == 2
    assert bench.reuse.warm("ann", prompt(50, 51, 52), 16, expires_at=100.0, to_the_end=True) == 0
    assert bench.run("ann", prompt(50, 51, 52, 60, 61)).state.reused_len == len(HEAD) + 3


def test_a_warm_slot_expires():
    bench = Bench()
    while bench.reuse.warm("ann", prompt(50, 51, 52), 16, expires_at=100.0):
        pass
    bench.reuse.expire(99.0)
    assert bench.reuse.next_expiry() == 100.0
    bench.reuse.expire(100.0)
    assert bench.reuse.next_expiry() is None
    assert bench.metrics.counter("prefetch_tokens_wasted") == len(HEAD) + 3
    assert bench.run("ann", prompt(50, 51, 52)).state.reused_len == 0
    assert bench.reuse.tree.entries == 0  # what nobody asked was not saved


def test_what_was_warmed_ahead_is_another_users_only_as_far_as_it_is_shared():
    bench = Bench(slots=1)
    while bench.reuse.warm("ann", prompt(50, 51, 52), 16, expires_at=100.0):
        pass
    assert bench.run("bob", prompt(50, 51, 52, 53)).state.reused_len == len(HEAD)


def test_heads_are_warmed_saved_and_pinned():
    bench = Bench()
    assert bench.reuse.pin(HEAD) is None
    while bench.reuse.warm(None, HEAD, 8):
        pass
    bench.reuse.keep_warm(None, HEAD)
    match = bench.reuse.pin(HEAD)
    assert match is not None
    assert match.rows()[:, 0, 0, 0, 0].astype(int).tolist() == HEAD
    bench.reuse.tree.clear()
    assert bench.reuse.saved_len("bob", HEAD) == len(HEAD)


def test_without_a_free_slot_nothing_is_warmed_and_a_query_is_refused():
    bench = Bench(slots=1)
    held = bench.run("ann", prompt(50, 51), release=False)
    assert bench.reuse.warm("bob", prompt(60, 61), 16) == 0
    with pytest.raises(NoFreeSlotError):
        bench.reuse.start("bob", prompt(60, 61), GREEDY, 4)
    bench.reuse.release(held)


def test_a_failing_chunk_leaves_nothing_behind():
    bench = Bench()
    bench.runner.fail_next = RuntimeError("boom")
    with pytest.raises(RuntimeError):
        bench.reuse.warm("ann", prompt(50, 51), 16)
    assert bench.engine.free_slots == 3
    assert all(bench.engine.slots.content(slot) is None for slot in range(3))


def test_a_cancelled_prompt_keeps_what_was_prefilled():
    bench = Bench()
    token_ids = prompt(*range(50, 90))
    started = bench.reuse.start("ann", token_ids, GREEDY, 4)
    bench.engine.prefill(started.state)
    bench.reuse.release(started)
    assert bench.run("ann", token_ids).state.reused_len == 16


def test_moving_a_sequence_forgets_what_it_overwrites():
    bench = Bench(slots=3)
    bench.run("ann", prompt(50, 51, 52, 53))  # slot 0 holds it now
    held = [bench.run("bob", prompt(60 + n, 61), release=False) for n in range(2)]
    assert sorted(started.state.slot for started in held) == [1, 2]
    bench.reuse.release(held[0])
    left = bench.engine.slots.free_slots
    bench.engine.slots.move(held[1].state.slot, left[0])
    assert bench.engine.slots.content(left[0]) is None
