"""Choosing the next token from a row of logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edge_llm.bundle.manifest import GenerationDefaults

# Colder than this, the most likely token has all the probability that a float can hold.
GREEDY_BELOW: Final = 1e-3


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How tokens are chosen. ``temperature`` 0 is greedy; 0 for ``top_k`` and 1 for ``top_p`` switch them off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    @classmethod
    def from_defaults(cls, defaults: GenerationDefaults) -> SamplingParams:
        """What a query that sets nothing is sampled with."""
        return cls(
            temperature=defaults.temperature,
            top_k=defaults.top_k,
            top_p=defaults.top_p,
            min_p=defaults.min_p,
            repetition_penalty=defaults.repetition_penalty,
        )

    @property
    def plain_greedy(self) -> bool:
        """The graph's own arg max is the answer, so logits need not be looked at."""
        return self.temperature < GREEDY_BELOW and self.repetition_penalty == 1.0

    @property
    def deterministic(self) -> bool:
        """The same prompt is answered the same way again."""
        return self.temperature < GREEDY_BELOW or self.seed is not None


class Sampler:
    """The state of one sequence's sampling: its random stream and the tokens it has seen.

    Args:
        params: how to choose.
        prompt_ids: the prompt, which the repetition penalty covers too.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        self.params = params
        self._rng = np.random.default_rng(params.seed)
        self._seen: dict[int, None] = {}
        if params.repetition_penalty != 1.0:
            self._seen = dict.fromkeys(prompt_ids)

    @property
    def needs_logits(self) -> bool:
        """Whether ``sample`` has to be asked: the graph's own arg max is not the answer."""
        return not self.params.plain_greedy

    def sample(self, logits: NDArray[np.float32]) -> int:
        """Choose a token from ``logits (vocab,) float32``, which is left unchanged."""
        token_id = self._choose(logits)
        if self.params.repetition_penalty != 1.0:
            self._seen[token_id] = None
        return token_id

    def _choose(self, logits: NDArray[np.float32]) -> int:
        params = self.params
        if self._seen:
            logits = _penalize(logits, list(self._seen), params.repetition_penalty)
        if params.temperature < GREEDY_BELOW or params.top_k == 1:
            return int(logits.argmax())
        token_ids = np.arange(logits.size)
        if 0 < params.top_k < logits.size:
            token_ids = np.argpartition(logits, -params.top_k)[-params.top_k :]
            logits = logits[token_ids]
        probabilities = _softmax(logits, params.temperature)
        if params.min_p > 0.0:
            # Nguyen et al. 2024, "Turning Up the Heat: Min-p Sampling": keep p >= min_p * p_max.
            kept = probabilities >= params.min_p * probabilities.max()
            token_ids, probabilities = token_ids[kept], probabilities[kept]
        if params.top_p < 1.0:
            # Holtzman et al. 2020, nucleus sampling: the smallest set of most likely tokens whose mass reaches top_p.
            order = np.argsort(-probabilities, kind="stable")
            mass = np.cumsum(probabilities[order]) / probabilities.sum()
            kept_count = int(np.searchsorted(mass, params.top_p)) + 1
            token_ids, probabilities = token_ids[order[:kept_count]], probabilities[order[:kept_count]]
        mass = np.cumsum(probabilities)
        drawn = int(np.searchsorted(mass, self._rng.random() * mass[-1], side="right"))
        return int(token_ids[min(drawn, token_ids.size - 1)])


def _penalize(logits: NDArray[np.float32], seen: list[int], penalty: float) -> NDArray[np.float32]:
    """Keskar et al. 2019 (CTRL): seen tokens' positive logits are divided by the penalty, negative ones multiplied."""
    penalized: NDArray[np.float32] = logits.copy()
    values: NDArray[np.float32] = logits[seen]
    penalized[seen] = np.where(values > 0, values / np.float32(penalty), values * np.float32(penalty))
    return penalized


def _softmax(logits: NDArray[np.float32], temperature: float) -> NDArray[np.float64]:
    # The largest exponent is 0, so that no temperature overflows.
    shifted: NDArray[np.float64] = np.exp((logits.astype(np.float64) - float(logits.max())) / temperature)
    shifted /= shifted.sum()
    return shifted
