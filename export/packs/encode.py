"""Examples as token ids, in the form that edge_llm/domain/schema.py describes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple

from edge_llm.domain.schema import (
    END_TOKEN,
    REPLY_TOKEN,
    SAY_TOKEN,
    USER_TOKEN,
    action_token,
    kind_token,
    slot_token,
    value_token,
    written,
)
from export.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edge_llm.domain.schema import DomainSchema
    from edge_llm.engine.tokenizer import Tokenizer
    from export.packs.examples import Example

_BEGINNING_TOKENS: Final = 6
_PLACEHOLDER: Final = re.compile(r"\{(\w+)\}")


class EncodedExample(NamedTuple):
    """``token_ids`` of prompt and answer; the answer begins at ``answer_start`` and ends with the end token."""

    token_ids: list[int]
    answer_start: int


class ExampleEncoder:
    """Encodes examples with a ``tokenizer`` that has the schema's special tokens.

    Raises:
        ExportError: it lacks one.
    """

    def __init__(self, schema: DomainSchema, tokenizer: Tokenizer) -> None:
        self._schema = schema
        self.tokenizer = tokenizer
        self._ids: dict[str, int] = {}
        for token in schema.special_tokens():
            token_id = tokenizer.token_id(token)
            if token_id is None:
                raise ExportError(f"the tokenizer lacks the pack's token {token!r}: distil the pack again")
            self._ids[token] = token_id

    @property
    def end_id(self) -> int:
        """The token that ends an answer."""
        return self._ids[END_TOKEN]

    @property
    def say_id(self) -> int:
        """The token that ends kind and actions."""
        return self._ids[SAY_TOKEN]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids; special tokens have none."""
        return self.tokenizer.decode(token_ids)

    def encode(self, example: Example) -> EncodedExample:
        """Prompt and answer."""
        prompt = self.prompt(example.text)
        answer = self._head(example)
        for sentence in example.answers:
            answer.append(self._ids[SAY_TOKEN])
            answer += self._sentence(sentence)
        return EncodedExample([*prompt, *answer, self._ids[END_TOKEN]], len(prompt))

    def _head(self, example: Example) -> list[int]:
        """Kind and actions."""
        answer = [self._ids[kind_token(example.kind)]]
        for call in example.calls:
            action = self._schema.action(call.action)
            assert action is not None
            answer.append(self._ids[action_token(call.action)])
            for name in (name for name in action.slots if name in call.slots):
                answer.append(self._ids[slot_token(name)])
                answer += self.tokenizer.encode(written(action.slots[name], call.slots[name]))
        return answer

    def beginning(self, encoded: EncodedExample) -> EncodedExample:
        """Without the rest of a long text: which one it is shows in its first words, which are the hard part."""
        after = encoded.token_ids.index(self.say_id, encoded.answer_start) + 1 + _BEGINNING_TOKENS
        return EncodedExample(encoded.token_ids[:after], encoded.answer_start)

    def reverse(self, example: Example) -> EncodedExample:
        """The other way round, for a model that is to find words: what is meant, then the utterance.

        Of a command only its actions are given; what is answered follows from them.
        """
        meant = self._head(example)
        if not example.calls:
            meant += [self._ids[SAY_TOKEN], *self._sentence(example.answers[0])]
        asked = [self._ids[REPLY_TOKEN], *meant, self._ids[USER_TOKEN]]
        return EncodedExample([*asked, *self.tokenizer.encode(example.text), self._ids[END_TOKEN]], len(asked))

    def echo(self, text: str) -> EncodedExample:
        """Words, and the same words again: an exercise in copying that is no utterance and has no meaning."""
        words = self.tokenizer.encode(" " + text)
        asked = [self._ids[SAY_TOKEN], *words, self._ids[REPLY_TOKEN]]
        return EncodedExample([*asked, *words, self._ids[END_TOKEN]], len(asked))

    def prompt(self, text: str) -> list[int]:
        """What comes before the answer."""
        return [self._ids[USER_TOKEN], *self.tokenizer.encode(text), self._ids[REPLY_TOKEN]]

    def _sentence(self, sentence: str) -> list[int]:
        ids: list[int] = []
        # Odd pieces are the names between the braces.
        for index, piece in enumerate(_PLACEHOLDER.split(sentence)):
            if index % 2:
                ids.append(self._ids[value_token(piece)])
            elif piece:
                ids += self.tokenizer.encode(piece)
        return ids
