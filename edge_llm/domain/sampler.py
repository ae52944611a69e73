"""Choosing tokens under the grammar, and how sure the model was."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from edge_llm.domain.grammar import GrammarState
from edge_llm.engine.sampler import Sampler

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edge_llm.domain.grammar import DomainGrammar
    from edge_llm.engine.sampler import SamplingParams


class DomainSampler(Sampler):
    """Takes the most likely token that the grammar allows; text after the actions is sampled as the query asks.

    Kind and actions are greedy whatever the temperature: what the car does is not a matter of chance.

    Args:
        grammar: of the bundle.
        params: for the text.
        prompt_ids: the prompt that is being answered.
        constrained: False lets the model write what it likes, for measuring what the grammar is worth.
    """

    def __init__(
        self, grammar: DomainGrammar, params: SamplingParams, prompt_ids: Sequence[int], *, constrained: bool = True
    ) -> None:
        super().__init__(params, prompt_ids)
        self._grammar = grammar
        self._prompt_ids = prompt_ids
        self._constrained = constrained
        # One for each token before the text, in order: the probability that the model itself gave it; for a word of a
        # text slot, among the words that could be copied there.
        self.probabilities: list[float] = []

    @cached_property
    def _state(self) -> GrammarState:
        # Only when a token is chosen: a prefix that is merely warmed has a sampler, too.
        return GrammarState(self._grammar, self._prompt_ids)

    @property
    def needs_logits(self) -> bool:
        """Whether the arg max of the graph is not enough."""
        return not self._state.in_text or super().needs_logits

    def sample(self, logits: NDArray[np.float32]) -> int:
        """Choose a token from ``logits (vocab,) float32``."""
        if self._state.in_text:
            return super().sample(logits)
        allowed = self._state.allowed()
        choices = logits
        if allowed is None or not self._constrained:
            token_id = int(logits.argmax())
        else:
            ids = np.fromiter(allowed, np.int64, len(allowed))
            token_id = int(ids[logits[ids].argmax()])
            if self._state.copies:
                # Which of the user's words it is: what else could be written there says nothing about that.
                choices = logits[ids]
        self.probabilities.append(_probability(choices, float(logits[token_id])))
        if allowed is None or token_id in allowed:
            self._state.advance(token_id)
        else:
            # Unconstrained, the model has left the form; what follows is judged by whoever reads it.
            self._state.in_text = True
        return token_id


def _probability(choices: NDArray[np.float32], chosen: float) -> float:
    """The softmax of one of the logits ``choices (n,)``."""
    shifted = choices.astype(np.float64) - chosen
    return float(1.0 / np.exp(np.minimum(shifted, 700.0)).sum())
