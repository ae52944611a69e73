"""A small domain for the tests: one slot of each type, an alternative, a value of the host, and its tokens."""

from __future__ import annotations

from collections.abc import Sequence

from edge_llm.domain.answer import DomainAnswer
from edge_llm.domain.domain import Domain
from edge_llm.domain.grammar import DomainGrammar, GrammarState
from edge_llm.domain.sampler import DomainSampler
from edge_llm.domain.schema import (
    Action,
    ChoiceSlot,
    DomainSchema,
    IntegerSlot,
    NumberSlot,
    StateValue,
    TextSlot,
)
from edge_llm.domain.state_values import StateValues
from edge_llm.engine.sampler import SamplingParams
from edge_llm.engine.tokenizer import Tokenizer
from tests.fakes import byte_tokenizer

SCHEMA = DomainSchema(
    format=1,
    name="car",
    version="1",
    failure="Sorry, please say it again.",
    max_actions=2,
    actions=(
        Action(
            name="window.move",
            slots={
                "which": ChoiceSlot(values={"driver": "the driver's window", "all": "all windows"}),
                "action": ChoiceSlot(values={"open": "open", "open-wide": "wide open", "close": "closed"}),
            },
        ),
        Action(name="climate.set", slots={"degrees": IntegerSlot(min=16, max=28)}),
        Action(name="radio.tune", slots={"mhz": NumberSlot(min=87.5, max=108.0)}),
        Action(
            name="volume",
            slots={"level": IntegerSlot(min=0, max=100), "change": ChoiceSlot(values={"up": "up", "down": "down"})},
            one_of=("level", "change"),
        ),
        Action(name="go.to", slots={"place": TextSlot(max_words=3)}, confirm=True),
        Action(
            name="play",
            slots={"song": TextSlot(), "station": ChoiceSlot(values={"news": "the news"})},
            one_of=("song", "station"),
        ),
        Action(name="trunk.open", confirm=True),
        Action(name="status.range"),
    ),
    state={
        "range_km": StateValue(type="integer", fallback="I do not know the range."),
        "place_now": StateValue(type="text", fallback="I do not know where we are."),
    },
)
TOKENIZER = byte_tokenizer(SCHEMA.special_tokens())
GRAMMAR = DomainGrammar(SCHEMA, TOKENIZER)


def ids(*parts: str, tokenizer: Tokenizer = TOKENIZER) -> list[int]:
    """Token ids of special tokens and plain text."""
    found: list[int] = []
    for part in parts:
        special = tokenizer.token_id(part) if part.startswith("<|") else None
        found += tokenizer.encode(part) if special is None else [special]
    return found


def prompt(text: str, tokenizer: Tokenizer = TOKENIZER) -> list[int]:
    """What the model is asked with; ``text`` never becomes a special token."""
    return [*ids("<|user|>", tokenizer=tokenizer), *tokenizer.encode(text), *ids("<|reply|>", tokenizer=tokenizer)]


def domain(*, constrained: bool = True) -> Domain:
    return Domain(SCHEMA, TOKENIZER, constrained=constrained)


def state(text: str = "", *written: int, grammar: DomainGrammar = GRAMMAR) -> GrammarState:
    """The grammar of an answer to ``text``, after some tokens, each of which it must allow."""
    found = GrammarState(grammar, prompt(text, grammar.tokenizer))
    for token_id in written:
        allowed = found.allowed()
        assert allowed is None or token_id in allowed, grammar.tokenizer.decode([token_id]) or token_id
        found.advance(token_id)
    return found


def accepts(token_ids: Sequence[int], text: str = "", grammar: DomainGrammar = GRAMMAR) -> bool:
    """Whether the grammar lets every token through."""
    found = GrammarState(grammar, prompt(text, grammar.tokenizer))
    for token_id in token_ids:
        allowed = found.allowed()
        if allowed is not None and token_id not in allowed:
            return False
        found.advance(token_id)
    return True


def answer(
    sampler: DomainSampler | None = None,
    values: dict[str, str] | None = None,
    stop: Sequence[str] = (),
) -> DomainAnswer:
    """A reader of answers, with what the host has published."""
    published = StateValues()
    for name, payload in (values or {}).items():
        assert published.update(name, payload.encode())
    return DomainAnswer(GRAMMAR, lambda: sampler, published, stop)


def read(*parts: str, values: dict[str, str] | None = None, stop: Sequence[str] = ()) -> DomainAnswer:
    """A whole answer, read token by token; ``<|…|>`` are special tokens."""
    found = answer(values=values, stop=stop)
    released = "".join(found.push([token_id]) for token_id in ids(*parts)) + found.finish()
    assert released == found.text
    return found


def greedy_sampler(text: str, *, constrained: bool = True, **params) -> DomainSampler:
    return DomainSampler(GRAMMAR, SamplingParams(**params), prompt(text), constrained=constrained)
