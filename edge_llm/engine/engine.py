"""Prefill and decode. Token ids in, token ids out; text is the business of tokenizer.py and text_stream.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from edge_llm.engine.kv_cache import SlotContent, SlotPool
from edge_llm.engine.sampler import Sampler, SamplingParams
from edge_llm.errors import ContextOverflowError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from edge_llm.engine.runner import ModelRunner

# The fewest tokens that a prefill runs at once, but for a prompt that has no more.
MIN_CHUNK: Final = 2


@dataclass(eq=False)
class GenerationState:
    """One sequence on its way through the engine.

    The cache row ``slot`` holds the first ``cached_len`` of ``prompt_ids + output_ids``. The newest output token is not
    in the cache yet: the next decode step puts it there. The first ``reused_len`` were in the row from the start.
    ``fault`` is set when choosing a token raised; such a sequence cannot go on.
    """

    prompt_ids: list[int]
    max_tokens: int
    sampler: Sampler
    slot: int
    stop_token_ids: frozenset[int]
    cached_len: int = 0
    reused_len: int = 0
    output_ids: list[int] = field(default_factory=list)
    stopped: bool = False
    fault: Exception | None = None

    @property
    def prefilled(self) -> bool:
        """The whole prompt is in the cache and the first token has been chosen."""
        return self.cached_len >= len(self.prompt_ids)

    @property
    def finished(self) -> bool:
        """A stop token came (it is not among ``output_ids``) or ``max_tokens`` is reached."""
        return self.stopped or len(self.output_ids) >= self.max_tokens

    def accept(self, token_id: int) -> None:
        """Take a chosen token."""
        if token_id in self.stop_token_ids:
            self.stopped = True
        else:
            self.output_ids.append(token_id)


class Engine:
    """Runs sequences over the slots of one runner. Not thread-safe: one thread owns it.

    Args:
        runner: the session and its cache.
        stop_token_ids: tokens that end an answer.
        prefill_chunk: the most prompt tokens run at once; other sequences decode in between.
        make_sampler: makes what chooses the tokens of an answer, from how it is sampled and its prompt.
    """

    def __init__(
        self,
        runner: ModelRunner,
        stop_token_ids: Collection[int],
        prefill_chunk: int = 64,
        make_sampler: Callable[[SamplingParams, Sequence[int]], Sampler] = Sampler,
    ) -> None:
        self.runner = runner
        self.prefill_chunk = prefill_chunk
        self.make_sampler = make_sampler
        self._stop_token_ids = frozenset(stop_token_ids)
        self.slots = SlotPool(runner.cache.slots)

    @property
    def max_seq_len(self) -> int:
        """Prompt and answer together, in tokens."""
        return self.runner.max_seq_len

    @property
    def free_slots(self) -> int:
        """How many more sequences can start."""
        return self.slots.free_count

    def start(
        self,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        max_tokens: int,
        *,
        slot: int | None = None,
        reused_len: int = 0,
    ) -> GenerationState:
        """Take a slot for a prompt; ``prefill`` it next.

        Args:
            prompt_ids: the whole prompt.
            sampling: how tokens are chosen.
            max_tokens: the most tokens to generate.
            slot: which free slot to take; None takes any.
            reused_len: how many of the prompt's leading tokens that slot holds already. ``MIN_CHUNK`` must be left for
                ``prefill``.

        Raises:
            ContextOverflowError: the prompt and ``max_tokens`` do not fit into the context, or the prompt is empty.
            NoFreeSlotError: every slot is taken.
        """
        self.check_fits(prompt_ids, max_tokens)
        sampler = self.make_sampler(sampling, prompt_ids)
        taken = self.slots.acquire(slot)
        return GenerationState(
            list(prompt_ids), max_tokens, sampler, taken, self._stop_token_ids, reused_len, reused_len
        )

    def check_fits(self, prompt_ids: Sequence[int], max_tokens: int) -> None:
        """Raises ``ContextOverflowError`` when there is no prompt, or no room for it and ``max_tokens``."""
        if not prompt_ids:
            raise ContextOverflowError("the prompt has no tokens")
        # The last token generated is never fed back, so it needs no place.
        if len(prompt_ids) + max_tokens - 1 > self.max_seq_len:
            raise ContextOverflowError(
                f"{len(prompt_ids)} prompt tokens and max_tokens {max_tokens} exceed the context of {self.max_seq_len}"
            )

    def prefill(self, state: GenerationState, max_chunk: int | None = None) -> None:
        """Run the next chunk of the prompt; the last one also chooses the first token.

        Args:
            state: the sequence.
            max_chunk: the most tokens to run, if fewer than ``prefill_chunk``; at least 3.
        """
        token_id = self._run_chunk(state, max_chunk)
        if state.prefilled:
            state.accept(self._choose(state, token_id, row=0))

    def extend(self, state: GenerationState, max_chunk: int | None = None) -> bool:
        """Like ``prefill`` for a prompt that is not complete yet: chooses no token, and leaves out a single last one.

        Returns:
            False if there was nothing to run.
        """
        if len(state.prompt_ids) - state.cached_len < MIN_CHUNK:
            return False
        self._run_chunk(state, max_chunk)
        return True

    def _run_chunk(self, state: GenerationState, max_chunk: int | None) -> int:
        remaining = len(state.prompt_ids) - state.cached_len
        count = min(remaining, self.prefill_chunk, max_chunk or self.prefill_chunk)
        # Attention over one new token is another kernel than over several, and rounds differently. With no chunk of one
        # token, the cache of a prompt is the same bit for bit however it was cut.
        if remaining - count == 1 and count > MIN_CHUNK:
            count -= 1
        chunk = state.prompt_ids[state.cached_len : state.cached_len + count]
        token_id = self.runner.prefill(state.slot, chunk, state.cached_len)
        state.cached_len += len(chunk)
        return token_id

    def decode(self, states: Sequence[GenerationState]) -> None:
        """Generate one token for each sequence, all of them in one run when their slots are neighbours."""
        self._compact(states)
        for group in _neighbours(states):
            next_ids = self.runner.decode(
                group[0].slot, [state.output_ids[-1] for state in group], [state.cached_len for state in group]
            ).tolist()
            for row, state in enumerate(group):
                state.cached_len += 1
                try:
                    state.accept(self._choose(state, next_ids[row], row))
                except Exception as fault:
                    # The others of the batch must not suffer for one's sampling.
                    state.fault = fault

    def replace_runner(self, runner: ModelRunner) -> None:
        """Go on with another runner of the same model and as many slots; no sequence may be running."""
        assert self.slots.free_count == self.slots.count == runner.cache.slots
        self.slots.forget_all()
        self.runner = runner

    def release(self, state: GenerationState, content: SlotContent | None = None) -> None:
        """Give the sequence's slot back, with what it holds for whoever comes next."""
        self.slots.release(state.slot, content)

    def generate(
        self, prompt_ids: Sequence[int], sampling: SamplingParams | None = None, max_tokens: int = 256
    ) -> Iterator[int]:
        """The whole loop for one sequence: prefill, decode, stop. Yields token ids as they are chosen."""
        state = self.start(prompt_ids, sampling or SamplingParams(), max_tokens)
        try:
            # 1. Prefill, chunk by chunk; the last chunk chooses the first token.
            while not state.prefilled:
                self.prefill(state)
            # 2. Decode one token at a time until a stop token or the limit.
            while not state.finished:
                yield state.output_ids[-1]
                self.decode([state])
                if state.fault is not None:
                    raise state.fault
            # 3. The token that reached the limit is part of the answer; a stop token is not.
            if not state.stopped:
                yield state.output_ids[-1]
        finally:
            self.release(state)

    def _choose(self, state: GenerationState, most_likely: int, row: int) -> int:
        if not state.sampler.needs_logits:
            return most_likely
        return state.sampler.sample(self.runner.logits(row))

    def _compact(self, states: Sequence[GenerationState]) -> None:
        """Move sequences into free slots so that one run covers them: a copy of one row, once per join or leave."""
        if len(states) < 2:
            return
        by_slot = {state.slot: state for state in states}
        for source, target in self.slots.compaction(by_slot.keys()):
            state = by_slot[source]
            self.runner.cache.copy_row(source, target, state.cached_len)
            self.slots.move(source, target)
            state.slot = target


def _neighbours(states: Sequence[GenerationState]) -> Iterator[list[GenerationState]]:
    """Group sequences whose slots follow one another without a gap."""
    group: list[GenerationState] = []
    for state in sorted(states, key=lambda candidate: candidate.slot):
        if group and state.slot != group[-1].slot + 1:
            yield group
            group = []
        group.append(state)
    if group:
        yield group
