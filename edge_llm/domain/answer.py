"""A domain model's tokens as kind, validated actions and text.

The counterpart of engine/text_stream.py. Nothing of a command's text is released before its actions have been checked
against the schema, and an action that does not pass is dropped. One that repeats another, slots and all, is done and
announced once.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

import msgspec

from edge_llm.domain.schema import SlotValue, is_complete, read_value, spoken
from edge_llm.engine.text_stream import TextStream

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edge_llm.domain.grammar import DomainGrammar
    from edge_llm.domain.sampler import DomainSampler
    from edge_llm.domain.schema import Action, Kind
    from edge_llm.domain.state_values import StateValues


class ActionCall(msgspec.Struct, frozen=True, kw_only=True):
    """An action that the host is asked to do, as it goes over the wire.

    ``confidence`` is the probability that the model gave to there being a command and to its name and slots. With
    ``confirm`` the host should ask back before it acts.
    """

    name: str
    slots: dict[str, SlotValue]
    confidence: float
    confirm: bool


class DomainAnswer:
    """The answer to one query while it is generated; stands in for a ``TextStream``.

    Args:
        grammar: of the bundle.
        sampler: finds the sampler of the answer's sequence, whose probabilities become confidences.
        values: what the host publishes.
        stop: strings that end the text.
    """

    def __init__(
        self,
        grammar: DomainGrammar,
        sampler: Callable[[], DomainSampler | None],
        values: StateValues,
        stop: Sequence[str] = (),
    ) -> None:
        self._grammar = grammar
        self._sampler = sampler
        self._values = values
        self._stop = tuple(stop)
        self._head: list[int] = []
        self._calls: list[ActionCall | None] = []  # None is one that was dropped, or repeats another
        self._repeated: set[int] = set()  # indices of those that repeat another
        self._part: TextStream | None = None
        self._part_index = -1
        self._part_failed = False
        self._held = ""  # text of a command's sentence, until the sentence is complete
        self._gap = False  # a space comes before the sentence, if it says anything
        self.kind: Kind = "chat"
        self.dropped_actions = 0
        self.is_volatile = False  # it holds a value that may be another one tomorrow
        self.text = ""
        self.stopped = False

    @property
    def actions(self) -> tuple[ActionCall, ...]:
        """Those that the schema allows."""
        return tuple(call for call in self._calls if call is not None)

    def push(self, token_ids: Sequence[int]) -> str:
        """Take new tokens; returns the text that may leave, which is often empty."""
        return "".join(self._released(self._push(token_id)) for token_id in token_ids)

    def finish(self) -> str:
        """The answer has ended: returns what was held back."""
        if self._part_index < 0:
            # It ended inside its actions: a half-written one is none.
            self._read_head()
            if self.kind == "command" and not self.stopped:
                self._calls = [None] * max(1, len(self._calls))
                self.dropped_actions = len(self._calls)
                return self._released(self._grammar.schema.failure)
        return self._released(self._end_part()) + self._released(self._drop_unsaid())

    def _drop_unsaid(self) -> str:
        """An answer that was cut short: nothing is done that nobody was told of."""
        unsaid = [index for index in range(self._part_index + 1, len(self._calls)) if index not in self._repeated]
        if not unsaid or self.kind != "command":
            return ""
        for index in unsaid:
            self.dropped_actions += self._calls[index] is not None
            self._calls[index] = None
        failure = self._grammar.schema.failure
        if failure in self.text:
            return ""
        return failure if not self.text or self.text[-1].isspace() else f" {failure}"

    def _push(self, token_id: int) -> str:
        if self.stopped:
            return ""
        if token_id == self._grammar.say_id:
            return self._begin_part()
        if self._part is None:
            self._head.append(token_id)
            return ""
        if not self._part_failed and token_id in self._grammar.placeholders:
            return self._hold(self._value(self._grammar.placeholders[token_id]))
        if self._part_failed or token_id in self._grammar.specials:
            return ""
        text = self._part.push([token_id])
        self.stopped = self._part.stopped
        return self._hold(text)

    def _begin_part(self) -> str:
        if self._part_index < 0:
            self._read_head()
            before = ""
        else:
            before = self._end_part()
        self._part_index += 1
        self._part = TextStream(self._grammar.tokenizer, self._stop)
        self._part_failed = self.kind == "command" and self._call is None
        if self._part_failed:
            failure = self._grammar.schema.failure
            # Once is enough; and a sentence that there is no action for is not said at all.
            has_action = self._part_index < len(self._calls) and self._part_index not in self._repeated
            silent = not has_action or failure in self.text + before
            self._held = "" if silent else failure
        self._gap = bool(self.text or before) and not (self.text + before)[-1].isspace()
        return before

    def _end_part(self) -> str:
        held, self._held = self._held, ""
        return self._spaced(held + (self._part.finish() if self._part is not None and not self._part_failed else ""))

    def _spaced(self, text: str) -> str:
        if not (text and self._gap):
            return text
        self._gap = False
        return text if text[0].isspace() else " " + text

    @property
    def _call(self) -> ActionCall | None:
        return self._calls[self._part_index] if self._part_index < len(self._calls) else None

    def _hold(self, text: str) -> str:
        """A command's sentence leaves in one piece: a value that is missing replaces all of it."""
        if self.kind != "command":
            return self._spaced(text)
        self._held += text
        return ""

    def _value(self, name: str) -> str:
        """What stands for a placeholder."""
        assert self._part is not None
        before = self._part.finish()
        call = self._call
        if call is not None and name in call.slots:
            action = self._grammar.schema.action(call.name)
            assert action is not None
            return before + spoken(action.slots[name], call.slots[name])
        declared = self._grammar.schema.state.get(name)
        if declared is None:
            return before
        self.is_volatile = True
        value = self._values.get(name, declared.type)
        if value is None:
            self._part_failed = True
            self._held = ""
            return declared.fallback
        return before + value

    def _read_head(self) -> None:
        """Kind and actions, once all their tokens are there."""
        grammar = self._grammar
        kinds = [grammar.kinds[token_id] for token_id in self._head[:1] if token_id in grammar.kinds]
        self.kind = kinds[0] if kinds else "refusal"
        starts = [index for index, token_id in enumerate(self._head) if token_id in grammar.actions]
        sampler = self._sampler()
        probabilities = sampler.probabilities if sampler is not None else []
        for start, end in pairwise([*starts, len(self._head)]):
            call = self._read_call(self._head[start:end], [*probabilities[:1], *probabilities[start:end]])
            if call is not None and not self._is_wanted(call):
                call = None
            self.dropped_actions += call is None
            if call is not None and any(other and _is_same(call, other) for other in self._calls):
                self._repeated.add(len(self._calls))
                call = None
            self._calls.append(call)
        if self._calls and self.kind != "command":
            # Words that say one thing and an action that does another: neither is to be trusted.
            self.dropped_actions += len(self.actions)
            self._calls = []
        if self.kind == "command" and not self._calls:
            self._calls = [None]
            self.dropped_actions += 1

    def _is_wanted(self, call: ActionCall) -> bool:
        schema = self._grammar.schema
        return len(self._calls) < schema.max_actions and call.confidence >= schema.min_confidence

    def _read_call(self, token_ids: Sequence[int], probabilities: Sequence[float]) -> ActionCall | None:
        grammar = self._grammar
        action = grammar.actions[token_ids[0]]
        slots: dict[str, SlotValue] = {}
        starts = [index for index, token_id in enumerate(token_ids) if token_id in grammar.slots]
        if len(token_ids) > 1 and starts[:1] != [1]:
            return None
        for start, end in pairwise([*starts, len(token_ids)]):
            name = grammar.slots[token_ids[start]]
            value = self._read_slot(action, name, token_ids[start + 1 : end])
            if value is None or name in slots:
                return None
            slots[name] = value
        if not is_complete(action, slots):
            return None
        confidence = math.exp(sum(math.log(max(p, 1e-12)) for p in probabilities)) if probabilities else 0.0
        return ActionCall(name=action.name, slots=slots, confidence=round(confidence, 4), confirm=action.confirm)

    def _read_slot(self, action: Action, name: str, token_ids: Sequence[int]) -> SlotValue | None:
        slot = action.slots.get(name)
        if slot is None or any(token_id in self._grammar.specials for token_id in token_ids):
            return None
        return read_value(slot, self._grammar.tokenizer.decode(token_ids))

    def _released(self, text: str) -> str:
        self.text += text
        return text


def _is_same(call: ActionCall, other: ActionCall) -> bool:
    """Whether they ask for the same: models repeat themselves more often than people ask for a thing twice."""
    return call.name == other.name and call.slots == other.slots
