"""Where a prompt starts: in the slot, or with the cached prefix, that holds the most of it.

A slot that holds the longest prefix is used in place. Otherwise the prefix is moved, once, into the slot that is worth
the least. What a slot holds is saved into the prefix cache when the engine is idle, or at the last moment before it is
overwritten.

Only rows that prefill has computed are kept. A decoded token's row comes from another attention kernel and differs in
the last bit, so that an answer after it could differ from one on a cold start (docs/architecture.md).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal

from edge_llm.engine.engine import MIN_CHUNK
from edge_llm.engine.kv_cache import SlotContent
from edge_llm.engine.prompt import common_prefix_length
from edge_llm.engine.sampler import SamplingParams
from edge_llm.errors import NoFreeSlotError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from edge_llm.cache.prefix_cache import PrefixCache, PrefixMatch
    from edge_llm.engine.engine import Engine, GenerationState
    from edge_llm.metrics import Metrics

CachedFrom = Literal["slot", "tree", "snapshot", "bundle", "partial"]
# So few tokens are computed anew about as fast as they are looked after.
_WORTH_SAVING: Final = 8
# Copying takes some microseconds a token: a query must not wait for more of them than this.
_SAVED_AT_ONCE: Final = 128
_SAVED_BEFORE_OVERWRITTEN: Final = 512


@dataclass(frozen=True, eq=False)
class Started:
    """A sequence in its slot.

    Attributes:
        state: its first ``reused_len`` tokens needed no prefill.
        owner: the user whose words it holds; None if they are everybody's.
        cached_from: where those tokens came from; None if there are none.
        saved_len: how many leading tokens the prefix cache has, too.
    """

    state: GenerationState
    owner: str | None
    cached_from: CachedFrom | None
    saved_len: int


@dataclass(frozen=True)
class _Place:
    """A free slot for a prompt. Its first ``reused_len`` tokens are there, or moved there from ``match`` or a slot."""

    slot: int
    reused_len: int = 0
    cached_from: CachedFrom | None = None
    match: PrefixMatch | None = None
    source_slot: int | None = None

    @property
    def moves(self) -> bool:
        """The tokens are not in the slot yet."""
        return self.match is not None or self.source_slot is not None


class PrefixReuse:
    """Starts and ends sequences so that prompts share their beginnings. Belongs to the engine's thread.

    Args:
        engine: whose slots.
        tree: the prefix cache, or None to use what the slots hold and nothing else.
        shared_prefixes: token ids of the prompt heads that are no user's words.
        metrics: counts the prefetched tokens that a query used, and those that came to nothing.
        enabled: False starts every prompt cold.
    """

    def __init__(
        self,
        engine: Engine,
        tree: PrefixCache | None,
        shared_prefixes: Sequence[Sequence[int]],
        metrics: Metrics,
        *,
        enabled: bool = True,
    ) -> None:
        self.enabled = enabled
        self.tree = tree
        self.shared_prefixes = [list(token_ids) for token_ids in shared_prefixes]
        self.engine = engine
        self.metrics = metrics
        self._slots = engine.slots

    def start(
        self,
        user: str,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        max_tokens: int,
        *,
        bypass: bool = False,
        ahead: bool = False,
    ) -> Started:
        """Take the best slot for a prompt, with all of it that is cached.

        Args:
            user: whose prompt it is.
            prompt_ids: the whole of it.
            sampling: how its answer's tokens are chosen.
            max_tokens: of the answer.
            bypass: use nothing that is cached.
            ahead: no query has come for it yet.

        Raises as ``Engine.start`` does.
        """
        tokens = list(prompt_ids)
        self.engine.check_fits(tokens, max_tokens)
        # The last rows are computed in any case: they give the logits, and a chunk of one token is no chunk.
        limit = max(0, len(tokens) - MIN_CHUNK)
        place = _Place(self._victim()) if bypass or not self.enabled else self._place(user, tokens, limit)
        content = self._slots.content(place.slot)
        prefetched_from = content.prefetched_from if content else None
        if prefetched_from is not None and not (ahead or place.moves):
            self.metrics.count("prefetch_tokens_used", max(0, place.reused_len - prefetched_from))
        return self._start(user, tokens, place, sampling, max_tokens)

    def release(
        self,
        started: Started,
        *,
        keep: bool = True,
        expires_at: float | None = None,
        prefetched_from: int | None = None,
    ) -> None:
        """End a sequence. Its prompt, as far as it was prefilled, stays in the slot unless ``keep`` is False.

        With ``expires_at`` (``time.monotonic()`` seconds) no query has come for it: it is given up then, and not saved.
        ``prefetched_from`` is the first of the tokens that count as wasted then.
        """
        state = started.state
        content = None
        if keep and self.enabled:
            tokens = state.prompt_ids[: state.cached_len]
            content = SlotContent(started.owner, tokens, saved_len=started.saved_len)
            if expires_at is not None:
                content.origin, content.expires_at = "partial", expires_at
                content.prefetched_from = prefetched_from
        self.engine.release(state, content)

    def warm(
        self,
        user: str | None,
        token_ids: Sequence[int],
        max_chunk: int,
        expires_at: float | None = None,
        *,
        to_the_end: bool = False,
    ) -> int:
        """Prefill one more chunk of a prefix in a free slot, ahead of any query.

        Args:
            user: whose words they are; None if everybody's.
            token_ids: the prefix; the slot is rewound to what it has in common with it.
            max_chunk: the most tokens to run, at least 3.
            expires_at: ``time.monotonic()`` seconds, when the slot is given up if no query came for these words; None
                if they are known to come again.
            to_the_end: a single last token is not left for later, at the price of computing the one before it again.

        Returns:
            How many tokens were computed; 0 if all of the prefix is there (or but one token), or no slot is free.
        """
        tokens = list(token_ids)
        fits = 0 < len(tokens) <= self.engine.max_seq_len
        if not (self.enabled and fits and self._slots.free_count):
            return 0
        place = self._place(user, tokens, len(tokens))
        if to_the_end and 0 < place.reused_len == len(tokens) - 1:
            place = replace(place, reused_len=place.reused_len - 1)
        content = self._slots.content(place.slot)
        if not place.moves and content is not None and len(tokens) - place.reused_len < MIN_CHUNK:
            if content.expires_at is not None and expires_at is not None:
                content.expires_at = expires_at
            return 0
        inherited = content.prefetched_from if content is not None and not place.moves else None
        started = self._start(user, tokens, place, SamplingParams(), max_tokens=1)
        state = started.state
        try:
            self.engine.extend(state, max_chunk)
        except Exception:
            self.release(started, keep=False)
            raise
        prefetched_from = place.reused_len if inherited is None else min(inherited, place.reused_len)
        self.release(started, expires_at=expires_at, prefetched_from=prefetched_from)
        computed = state.cached_len - place.reused_len
        self.metrics.count("rewarmed_tokens" if expires_at is None else "prefetch_tokens_computed", computed)
        return computed

    def run_for_nothing(self) -> bool:
        """A decode step behind what a free slot holds, which changes nothing of it. False if there is no room."""
        contents = {slot: self._slots.content(slot) for slot in self._slots.free_slots}
        lengths = {slot: len(content.token_ids) if content else 0 for slot, content in contents.items()}
        slot = min(lengths, key=lengths.__getitem__, default=None)
        if slot is None or lengths[slot] >= self.engine.max_seq_len:
            return False
        self.engine.runner.decode(slot, [0], [lengths[slot]])
        return True

    def keep_warm(self, user: str | None, token_ids: Sequence[int]) -> None:
        """Save a prefix that a free slot holds into the prefix cache."""
        if self.tree is None:
            return
        tokens = list(token_ids)
        for slot, content in self._slots.contents():
            if content.owner == user and content.token_ids[: len(tokens)] == tokens:
                content.saved_len = max(content.saved_len, self._insert(slot, user, tokens))
                return

    def pin(self, token_ids: Sequence[int]) -> PrefixMatch | None:
        """Never give up a shared prefix that the prefix cache has. None if it does not have all of it."""
        if self.tree is None:
            return None
        tokens = list(token_ids)
        match = self.tree.match_prefix(None, tokens, len(tokens))
        if match.length < len(tokens):
            return None
        self.tree.pin(match)
        return match

    def saved_len(self, user: str | None, token_ids: Sequence[int]) -> int:
        """How many leading tokens of a prefix the prefix cache has."""
        if self.tree is None:
            return 0
        return self.tree.match_prefix(user, token_ids, self._shared_len(user, token_ids)).length

    def save_one(self) -> bool:
        """Save some of what a free slot holds and the prefix cache does not. False if there was nothing to save."""
        for slot, content in self._slots.contents():
            if self._worth_saving(content, 0):
                self._save(slot, content, _SAVED_AT_ONCE)
                return True
        return False

    def expire(self, now: float) -> None:
        """Give up the slots whose query never came."""
        for slot, content in self._slots.contents():
            if content.expires_at is not None and now >= content.expires_at:
                self._settle(content, 0)
                self._slots.forget(slot)

    def next_expiry(self) -> float | None:
        """When ``expire`` has something to do, in ``time.monotonic()`` seconds; None if never."""
        contents = self._slots.contents()
        return min((held.expires_at for _, held in contents if held.expires_at is not None), default=None)

    def forget_users(self) -> None:
        """Drop what users have said: what the free slots hold, and all of the prefix cache that is not pinned."""
        self._slots.forget_all()
        if self.tree is not None:
            self.tree.clear()

    def forget(self, token_nbytes: int | None = None) -> None:
        """Drop everything: what the slots hold, and the prefix cache with its pinned prefixes.

        Args:
            token_nbytes: KV bytes of a token from now on, if another runner goes on.
        """
        self._slots.forget_all()
        if self.tree is not None:
            self.tree.reset(token_nbytes)

    def _shared_len(self, user: str | None, token_ids: Sequence[int]) -> int:
        """How many leading tokens of a prompt are no user's words; all of them if there is no user."""
        if user is None:
            return len(token_ids)
        return max((common_prefix_length(prefix, token_ids) for prefix in self.shared_prefixes), default=0)

    def _start(
        self, user: str | None, tokens: list[int], place: _Place, sampling: SamplingParams, max_tokens: int
    ) -> Started:
        content = self._slots.content(place.slot)
        kept = self._usable(place.slot, user, tokens, self._shared_len(user, tokens)) if content else 0
        kept = min(kept, place.reused_len)
        saved_len = 0
        with self._locked(place.match):  # what is saved here must not push it out
            if content is not None:
                if self._worth_saving(content, kept):
                    self._save(place.slot, content, _SAVED_BEFORE_OVERWRITTEN)
                self._settle(content, kept)
                saved_len = min(content.saved_len, kept)
            state = self.engine.start(tokens, sampling, max_tokens, slot=place.slot, reused_len=place.reused_len)
            try:
                cache = self.engine.runner.cache
                if place.match is not None:
                    place.match.write_to(cache, place.slot, kept, place.reused_len)
                    saved_len = place.reused_len
                elif place.source_slot is not None:
                    cache.copy_row(place.source_slot, place.slot, place.reused_len)
            except BaseException:
                self.engine.release(state)
                raise
        return Started(state, user, place.cached_from, saved_len)

    @contextlib.contextmanager
    def _locked(self, match: PrefixMatch | None) -> Iterator[None]:
        if match is None or self.tree is None:
            yield
            return
        self.tree.lock(match)
        try:
            yield
        finally:
            self.tree.unlock(match)

    def _place(self, user: str | None, tokens: list[int], limit: int) -> _Place:
        """The longest prefix there is, and the slot to have it in."""
        shared_len = self._shared_len(user, tokens)
        victim = self._victim()
        best, best_len = victim, 0
        for slot in self._slots.free_slots:
            length = min(limit, self._usable(slot, user, tokens, shared_len))
            rank = (length, slot == victim, self._is_spare(slot, user))
            # Of two equal ones the one that can be used where it is.
            if rank > (best_len, best == victim, self._is_spare(best, user)):
                best, best_len = slot, length
        match = None if self.tree is None else self.tree.match_prefix(user, tokens, shared_len)
        match_len = 0 if match is None else min(limit, match.length)
        own = self._owner(best) == user and best_len > match_len
        in_place = best == victim or own or self._is_spare(best, user)
        if best_len and (best_len > match_len or (best_len == match_len and in_place)):
            origin: CachedFrom = self._origin(best, best_len)
            if in_place:
                return _Place(best, best_len, origin)
            return _Place(victim, best_len, origin, source_slot=best)
        if match is not None and match_len:
            return _Place(victim, match_len, match.origin, match=match)
        return _Place(victim)

    def _victim(self) -> int:
        """The free slot that is worth the least: an empty one, or the one that was used the longest ago."""
        free = self._slots.free_slots
        if not free:
            raise NoFreeSlotError("every slot is taken")
        return min(free, key=self._worth)

    def _worth(self, slot: int) -> tuple[bool, int]:
        """For comparison: words that a query is expected for are worth more than those of an old one."""
        content = self._slots.content(slot)
        return (False, 0) if content is None else (content.expires_at is not None, content.used_at)

    def _usable(self, slot: int, user: str | None, tokens: list[int], shared_len: int) -> int:
        """How many leading tokens of a prompt a slot holds and this user may have."""
        content = self._slots.content(slot)
        if content is None:
            return 0
        length = common_prefix_length(content.token_ids, tokens)
        return length if content.owner is None or content.owner == user else min(length, shared_len)

    def _owner(self, slot: int) -> str | None:
        content = self._slots.content(slot)
        return None if content is None else content.owner

    def _is_spare(self, slot: int, user: str | None) -> bool:
        """Whether a slot is the user's own, and rewinding it loses nothing that is not saved or still expected."""
        content = self._slots.content(slot)
        if content is None or content.owner != user or content.expires_at is not None:
            return False
        return self.tree is None or not self._worth_saving(content, 0)

    def _origin(self, slot: int, length: int) -> CachedFrom:
        content = self._slots.content(slot)
        if content is None or content.origin != "partial":
            return "slot"
        return "partial" if length > (content.prefetched_from or 0) else "slot"

    def _worth_saving(self, content: SlotContent, kept: int) -> bool:
        if self.tree is None or content.origin == "partial":
            return False
        return len(content.token_ids) - max(content.saved_len, kept) >= _WORTH_SAVING

    def _save(self, slot: int, content: SlotContent, most: int) -> None:
        """Save at most so many more tokens."""
        stop = min(len(content.token_ids), content.saved_len + most)
        try:
            held = self._insert(slot, content.owner, content.token_ids[:stop])
        except (MemoryError, OSError):
            held = 0
        # If there was no room it is not tried again and again.
        content.saved_len = stop if held >= stop else len(content.token_ids)

    def _insert(self, slot: int, user: str | None, tokens: list[int]) -> int:
        assert self.tree is not None
        cache = self.engine.runner.cache
        shared_len = self._shared_len(user, tokens)
        return self.tree.insert_prefix(user, tokens, shared_len, lambda start, stop: cache.read_rows(slot, start, stop))

    def _settle(self, content: SlotContent, kept: int) -> None:
        """Count what was prefetched into a slot and is given up now."""
        if content.prefetched_from is not None:
            wasted = len(content.token_ids) - max(kept, content.prefetched_from)
            self.metrics.count("prefetch_tokens_wasted", max(0, wasted))
