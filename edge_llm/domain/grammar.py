"""Which tokens may come next while a domain model writes its kind and actions, compiled from the pack's schema.

Names, choices and numbers come from token tries made once. A text slot may only hold a run of the user's own words, so
its trie is made for each query, when the model has chosen such a slot: a destination that nobody said cannot come out.
The model still chooses among what is allowed. After the first ``<|say|>`` anything may come.
"""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING, Final

from edge_llm.domain.schema import (
    KINDS,
    REPLY_TOKEN,
    SAY_TOKEN,
    USER_TOKEN,
    ChoiceSlot,
    IntegerSlot,
    NumberSlot,
    TextSlot,
    action_token,
    kind_token,
    slot_token,
    value_token,
    written,
)
from edge_llm.errors import ManifestError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from edge_llm.domain.schema import Action, DomainSchema, Slot
    from edge_llm.engine.tokenizer import Tokenizer

# Tries of more numbers, in one slot or in all, would take too much memory; packs ask for degrees and minutes.
_MAX_NUMBERS: Final = 20_000
_MAX_VALUES: Final = 60_000
# Languages without spaces: each character may begin or end a run.
_WORD: Final = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\s\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
_EDGE: Final = re.compile(r"^\W+|\W+$")


class TrieNode:
    """One step of the allowed token sequences."""

    __slots__ = ("children", "is_end")

    def __init__(self) -> None:
        self.children: dict[int, TrieNode] = {}
        self.is_end = False

    def add(self, token_ids: Iterable[int]) -> None:
        """Allow a sequence."""
        node = self
        for token_id in token_ids:
            node = node.children.setdefault(token_id, TrieNode())
        node.is_end = True


class DomainGrammar:
    """The grammar of one bundle.

    Args:
        schema: the pack's.
        tokenizer: the bundle's.

    Raises:
        ManifestError: the tokenizer lacks a token of the schema, or a slot has too many values.
    """

    def __init__(self, schema: DomainSchema, tokenizer: Tokenizer) -> None:
        self.schema = schema
        self.tokenizer = tokenizer
        self.ids = {token: _require(tokenizer, token) for token in schema.special_tokens()}
        self.say_id = self.ids[SAY_TOKEN]
        self.user_id = self.ids[USER_TOKEN]
        self.reply_id = self.ids[REPLY_TOKEN]
        self.kinds = {self.ids[kind_token(kind)]: kind for kind in KINDS}
        self.actions = {self.ids[action_token(action.name)]: action for action in schema.actions}
        self.slots = {self.ids[slot_token(name)]: name for action in schema.actions for name in action.slots}
        names = dict.fromkeys([*self.slots.values(), *schema.state])
        self.placeholders = {self.ids[value_token(name)]: name for name in names}
        self.specials = frozenset(self.ids.values())
        # Those that can be completed although nobody said a word that could fill a text slot.
        self.wordless = frozenset(
            token_id
            for token_id, action in self.actions.items()
            if all(any(not isinstance(action.slots[name], TextSlot) for name in group) for group in slot_groups(action))
        )
        self._tries: dict[tuple[str, str], TrieNode] = {}
        self._value_count = 0
        for action in schema.actions:
            for name, slot in action.slots.items():
                if not isinstance(slot, TextSlot):
                    self._tries[action.name, name] = self._trie(action, name, slot)

    def trie(self, action: Action, slot_name: str, prompt_ids: Sequence[int]) -> TrieNode:
        """What may be written as a slot's value in answer to a prompt."""
        known = self._tries.get((action.name, slot_name))
        if known is not None:
            return known
        slot = action.slots[slot_name]
        assert isinstance(slot, TextSlot)
        return self._said(self.user_text(prompt_ids), slot.max_words)

    def has_words(self, prompt_ids: Sequence[int]) -> bool:
        """Whether a text slot can be filled in answer to a prompt."""
        return bool(_words(self.user_text(prompt_ids)))

    def user_text(self, prompt_ids: Sequence[int]) -> str:
        """The words of the last user message of a prompt."""
        ids = list(prompt_ids)
        end = len(ids) - 1 - ids[::-1].index(self.reply_id) if self.reply_id in ids else len(ids)
        start = max((index for index, token_id in enumerate(ids[:end]) if token_id == self.user_id), default=-1)
        return self.tokenizer.decode(ids[start + 1 : end])

    def _trie(self, action: Action, name: str, slot: Slot) -> TrieNode:
        root = TrieNode()
        values = _values(slot, f"{action.name}.{name}")
        self._value_count += len(values)
        if self._value_count > _MAX_VALUES:
            raise ManifestError(f"the slots have more than {_MAX_VALUES} values together: make some ranges smaller")
        for value in values:
            root.add(self.tokenizer.encode(value))
        return root

    def _said(self, text: str, max_words: int) -> TrieNode:
        """Every run of up to ``max_words`` words, without the punctuation around it, after a space."""
        root = TrieNode()
        words = _words(text)
        for index, (start, _) in enumerate(words):
            run = words[index : index + max_words]
            piece = " " + text[start : run[-1][1]]
            ids, ends = self.tokenizer.encode_with_ends(piece)
            edges = {end - start + 1 for _, end in run}
            # "It's Granny's birthday, call her."
            edges |= {edge - 2 for edge in edges if piece[:edge].endswith(("'s", "\u2019s")) and piece[edge - 3] != " "}
            node = root
            # Of the tokens that make up one character, each ends where the character does: only the last completes it.
            for token_id, end, following in zip(ids, ends, [*ends[1:], -1], strict=True):
                node = node.children.setdefault(token_id, TrieNode())
                # Where words have spaces between them, a shorter run's tokens are the beginning of this one's.
                node.is_end = node.is_end or (end in edges and end != following)
            for edge in edges.difference(ends):
                root.add(self.tokenizer.encode(piece[:edge]))
        return root


class GrammarState:
    """Where one answer stands in the grammar.

    Args:
        grammar: of the bundle.
        prompt_ids: the prompt that is being answered.
    """

    def __init__(self, grammar: DomainGrammar, prompt_ids: Sequence[int]) -> None:
        self._grammar = grammar
        self._prompt_ids = prompt_ids
        # Nothing was said that could fill a text slot: only what needs none can be asked for.
        self._has_words = grammar.has_words(prompt_ids)
        self._possible = frozenset(grammar.actions) if self._has_words else grammar.wordless
        self._next = frozenset(grammar.kinds)
        if not self._possible:
            self._next -= {grammar.ids[kind_token("command")]}
        self._node: TrieNode | None = None
        self._action: Action | None = None
        self._is_text = False  # of the slot that is being filled
        self._groups: list[tuple[str, ...]] = []  # slots still to come; of a group exactly one
        self._actions_left = grammar.schema.max_actions
        self.in_text = False

    def allowed(self) -> frozenset[int] | None:
        """Tokens that may come next; None if any may."""
        if self.in_text:
            return None
        if self._node is None:
            return self._next
        after = self._after_slots() if self._node.is_end else frozenset()
        return after | self._node.children.keys()

    @property
    def copies(self) -> bool:
        """Whether the next token belongs to a text slot, whose words can only be the user's own."""
        return self._node is not None and self._is_text

    def advance(self, token_id: int) -> None:
        """Take the chosen token, one of ``allowed``."""
        grammar = self._grammar
        if self.in_text:
            return
        if self._node is not None and token_id in self._node.children:
            self._node = self._node.children[token_id]
            return
        self._node = None
        if token_id == grammar.say_id:
            self.in_text = True
        elif token_id in grammar.actions:
            self._action = grammar.actions[token_id]
            self._groups = slot_groups(self._action)
            self._actions_left -= 1
            self._next = self._after_slots()
        elif token_id in grammar.slots and self._action is not None:
            name = grammar.slots[token_id]
            self._groups = [group for group in self._groups if name not in group]
            self._is_text = isinstance(self._action.slots[name], TextSlot)
            self._node = grammar.trie(self._action, name, self._prompt_ids)
        elif grammar.kinds.get(token_id) == "command":
            self._next = self._possible
        else:
            self._next = frozenset([grammar.say_id])

    def _after_slots(self) -> frozenset[int]:
        grammar = self._grammar
        if self._groups:
            return frozenset(grammar.ids[slot_token(name)] for name in self._groups[0] if self._can_fill(name))
        more = self._possible if self._actions_left > 0 else frozenset()
        return more | {grammar.say_id}

    def _can_fill(self, slot_name: str) -> bool:
        assert self._action is not None
        return self._has_words or not isinstance(self._action.slots[slot_name], TextSlot)


def slot_groups(action: Action) -> list[tuple[str, ...]]:
    """Slots in the order in which they are written; the alternatives of ``one_of`` stand together."""
    groups: list[tuple[str, ...]] = []
    for name in action.slots:
        if name not in action.one_of:
            groups.append((name,))
        elif action.one_of not in groups:
            groups.append(action.one_of)
    return groups


def _values(slot: Slot, where: str) -> list[str]:
    if isinstance(slot, ChoiceSlot):
        return [written(slot, value) for value in slot.values]
    assert isinstance(slot, IntegerSlot | NumberSlot)
    scale = 1 if isinstance(slot, IntegerSlot) else 10**slot.decimals
    low, high = round(slot.min * scale), round(slot.max * scale)
    if high - low >= _MAX_NUMBERS:
        raise ManifestError(f"slot {where} has more than {_MAX_NUMBERS} values: make its range smaller")
    if isinstance(slot, IntegerSlot):
        return [written(slot, number) for number in range(low, high + 1)]
    return [written(slot, number / scale) for number in range(low, high + 1)]


def _words(text: str) -> list[tuple[int, int]]:
    """Where each word begins and ends."""
    words = [_core(found) for found in _WORD.finditer(text)]
    return [(start, end) for start, end in words if start < end]


def _core(found: re.Match[str]) -> tuple[int, int]:
    """Where a word begins and ends without the punctuation around it."""
    word = found.group()
    left = _EDGE.match(word)
    start = left.end() if left and left.start() == 0 else 0
    end = len(re.sub(r"\W+$", "", word))
    # Vowel signs and accents belong to their letter, but are no word characters to ``re``.
    while 0 < end < len(word) and unicodedata.category(word[end]).startswith("M"):
        end += 1
    return found.start() + start, found.start() + max(start, end)


def _require(tokenizer: Tokenizer, token: str) -> int:
    token_id = tokenizer.token_id(token)
    if token_id is None:
        raise ManifestError(f"the domain's token {token!r} is not in tokenizer.json")
    return token_id
