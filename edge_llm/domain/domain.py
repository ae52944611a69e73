"""A domain bundle's part of the engine and the scheduler: its samplers and its answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge_llm.domain.answer import DomainAnswer
from edge_llm.domain.grammar import DomainGrammar
from edge_llm.domain.sampler import DomainSampler
from edge_llm.domain.schema import MAX_DOMAIN_BYTES, decode_domain
from edge_llm.domain.state_values import StateValues
from edge_llm.errors import ManifestError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edge_llm.bundle.manifest import Bundle
    from edge_llm.domain.schema import DomainSchema
    from edge_llm.engine.sampler import Sampler, SamplingParams
    from edge_llm.engine.tokenizer import Tokenizer


class Domain:
    """What a model was trained to do. ``values`` are the host's; whoever hears them may put its own in place.

    Args:
        schema: the pack's.
        tokenizer: the bundle's.
        constrained: False switches the grammar off, for measuring what it is worth.

    Raises:
        ManifestError: schema and tokenizer do not belong together.
    """

    def __init__(self, schema: DomainSchema, tokenizer: Tokenizer, *, constrained: bool = True) -> None:
        self.schema = schema
        self.grammar = DomainGrammar(schema, tokenizer)
        self.values = StateValues()
        self._constrained = constrained

    @classmethod
    def from_bundle(cls, bundle: Bundle, tokenizer: Tokenizer) -> Domain | None:
        """The domain of a bundle, or None if it has none. Raises ``BundleError`` if its file is damaged."""
        schema = read_schema(bundle)
        return None if schema is None else cls(schema, tokenizer)

    def sampler(self, params: SamplingParams, prompt_ids: Sequence[int]) -> DomainSampler:
        """What chooses the tokens of one answer."""
        return DomainSampler(self.grammar, params, prompt_ids, constrained=self._constrained)

    def answer(self, sampler: Callable[[], Sampler | None], stop: Sequence[str]) -> DomainAnswer:
        """What reads the tokens of one answer; ``sampler`` finds the sampler that chooses them."""

        def own() -> DomainSampler | None:
            found = sampler()
            return found if isinstance(found, DomainSampler) else None

        return DomainAnswer(self.grammar, own, self.values, stop)


def read_schema(bundle: Bundle) -> DomainSchema | None:
    """``domain.json`` of a bundle, or None if it has none. Raises ``BundleError`` if it is damaged."""
    name = bundle.manifest.domain_file
    if name is None:
        return None
    path = bundle.verified_path(name)
    if path.stat().st_size > MAX_DOMAIN_BYTES:
        raise ManifestError(f"{path} is larger than {MAX_DOMAIN_BYTES} bytes")
    return decode_domain(path.read_bytes())
