"""Examples from a pack's templates: slots filled, sentences joined, noise added; endless, and the same for a seed."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from edge_llm.domain.schema import ChoiceSlot, IntegerSlot, NumberSlot, TextSlot
from export.packs.lines import Call, SlotPart
from export.packs.noise import Piece, add_aside, add_noise, lower_first
from export.packs.numbers import say_integer, say_number

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from edge_llm.domain.schema import Kind, Slot, SlotValue
    from export.packs.lines import Template
    from export.packs.pack import Intent, Pack, Reply, SlotWords

# How often each kind of example is drawn. Outside examples are many because acting on one is the worst mistake.
_SHARES: Final[Mapping[str, float]] = {
    "intent": 0.36,
    "mixed": 0.07,
    "joined": 0.09,
    "out_of_range": 0.03,
    "fact": 0.14,
    "chat": 0.06,
    "refusal": 0.25,
    "rephrased": 0.8,
}
_ONSETS: Final = (*"bcdfghjklmnprstvwz", "br", "ch", "cr", "dr", "fl", "gr", "kr", "pl", "sh", "st", "th", "tr")
_VOWELS: Final = (*"aeiouaeio", "ai", "ea", "ee", "ou", "ia")
_CODAS: Final = ("", "", "", *"nrslmtx", "ck", "nd", "rt", "th")
_MAX_JOINED_CHARACTERS: Final = 120
# How often a number is an end of its range.
_END_SHARE: Final = 0.1


@dataclass(frozen=True)
class Example:
    """What somebody says, and all that should come of it.

    Attributes:
        text: the utterance.
        kind: of the answer.
        calls: the actions, complete.
        answers: one sentence for each action, or one alone; ``{name}`` stands for a slot or a value of the host.
        source: the intent or reply, or the line, that it was made from.
    """

    text: str
    kind: Kind
    calls: tuple[Call, ...]
    answers: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class Rephrased:
    """A wording that no author wrote (export/distill/rephrase.py), complete with its meaning."""

    template: Template
    kind: Kind
    answers: tuple[str, ...]


class ExampleMaker:
    """Draws examples.

    Args:
        pack: the templates.
        seed: the same seed draws the same examples.
        rephrased: more wordings, drawn beside the pack's own.
        noise: False draws the words as they are written.
    """

    def __init__(self, pack: Pack, seed: int, *, rephrased: Sequence[Rephrased] = (), noise: bool = True) -> None:
        self._pack = pack
        self._seed = seed
        self._rephrased = tuple(rephrased)
        self._noise = noise
        self._rng = random.Random(seed)  # noqa: S311 - not for secrets
        self._shares = [(name, share) for name, share in _SHARES.items() if self._has(name)]
        self._intents = list(pack.intents)
        self._intent_weights = [_weight(intent) for intent in self._intents]
        self._words = [template.text for intent in pack.intents for template in intent.templates]
        self._words += [value for words in pack.words.values() for value in words.values]
        self._ranged = [
            (intent, template) for intent in pack.intents for template in intent.templates if self._open_range(template)
        ]

    def __iter__(self) -> Iterator[Example]:
        while True:
            yield self.draw()

    @property
    def source(self) -> str:
        """All that decides which examples come: equal for makers that draw the same."""
        return repr((self._pack, self._seed, self._rephrased, self._noise))

    def draw(self) -> Example:
        """One example, with noise."""
        names, weights = zip(*self._shares, strict=True)
        share = self._rng.choices(names, weights)[0]
        if share == "intent":
            return self.command(self._draw_intent_template())
        if share == "mixed":
            return self.command(self._rng.choice(self._pack.mixed))
        if share == "joined":
            return self._joined()
        if share == "out_of_range":
            return self._out_of_range()
        if share == "rephrased":
            return self._found()
        replies = [reply for reply in self._pack.replies if reply.kind == share]
        reply = self._rng.choices(replies, [_weight(reply) for reply in replies])[0]
        return self.reply(reply, self._rng.choice(reply.templates))

    def echo(self) -> str:
        """Words without a meaning, for an exercise in copying: known ones in any order, made-up ones, numbers."""
        rng = self._rng
        words = []
        for _ in range(rng.randint(2, 9)):
            way = rng.random()
            if way < 0.6:
                words.append(rng.choice(rng.choice(self._words).split()))
            else:
                words.append(self._made_up() if way < 0.9 else str(rng.randint(0, 300)))
        return " ".join(words)

    def command(self, template: Template, *, noise: bool = True) -> Example:
        """A template of actions, filled."""
        pieces, calls = self._filled(template)
        if noise:
            pieces = self._noisy(pieces)
        return self._example(pieces, calls, template.where)

    def reply(self, reply: Reply, template: Template, *, noise: bool = True) -> Example:
        """A template that is answered in words alone."""
        pieces = [Piece(template.text)]
        if noise:
            # A filler would turn noise, which has its own reply, into something else.
            fillers = reply.kind != "chat"
            pieces = self._noisy(pieces) if fillers or not self._noise else add_noise(pieces, (), (), self._rng)
        return Example(_text(pieces), reply.kind, (), (reply.answer,), reply.name)

    def _found(self) -> Example:
        one = self._rng.choice(self._rephrased)
        if one.kind == "command":
            return self.command(one.template)
        pieces = self._noisy([Piece(one.template.text)])
        return Example(_text(pieces), one.kind, (), one.answers, one.template.where)

    def _has(self, share: str) -> bool:
        if share in ("mixed", "rephrased"):
            return bool(self._pack.mixed if share == "mixed" else self._rephrased)
        if share == "out_of_range":
            return any(self._open_range(template) for intent in self._pack.intents for template in intent.templates)
        if share == "joined":
            return self._pack.schema.max_actions > 1 and len({intent.action for intent in self._pack.intents}) > 1
        if share == "intent":
            return True
        return any(reply.kind == share for reply in self._pack.replies)

    def _draw_intent_template(self) -> Template:
        intent: Intent = self._rng.choices(self._intents, self._intent_weights)[0]
        return self._rng.choice(intent.templates)

    def _open_range(self, template: Template) -> str | None:
        """The slot of a template that has a range and is left open."""
        for part in template.parts:
            if isinstance(part, SlotPart) and part.words is None:
                slot = self._pack.action(template.calls[0].action).slots[part.slot]
                if isinstance(slot, IntegerSlot | NumberSlot):
                    return part.slot
        return None

    def _filled(self, template: Template) -> tuple[list[Piece], list[Call]]:
        calls = [Call(call.action, dict(call.slots)) for call in template.calls]
        pieces: list[Piece] = []
        for part in template.parts:
            if isinstance(part, str):
                pieces.append(Piece(part))
                continue
            index = part.call
            slots: dict[str, SlotValue] = dict(calls[index].slots)
            slot = self._pack.action(calls[index].action).slots[part.slot]
            words = part.words
            if words is None:
                slots[part.slot], words = self._value(slot, self._pack.words[calls[index].action, part.slot])
                calls[index] = Call(calls[index].action, slots)
            pieces.append(Piece(words, (index, part.slot) if isinstance(slot, TextSlot) else None))
        return pieces, calls

    def _value(self, slot: Slot, words: SlotWords) -> tuple[SlotValue, str]:
        """A value of a slot, and how it is said."""
        rng = self._rng
        if isinstance(slot, IntegerSlot):
            # The ends are said more often than chance would have it, and are where mistakes are made.
            number = rng.choice([slot.min, slot.max]) if rng.random() < _END_SHARE else rng.randint(slot.min, slot.max)
            return number, say_integer(number, rng)
        if isinstance(slot, NumberSlot):
            value = round(rng.uniform(slot.min, slot.max), slot.decimals)
            return value, say_number(value, slot.decimals, rng)
        if isinstance(slot, ChoiceSlot):
            chosen = rng.choice([value for value, spoken in words.spoken.items() if spoken])
            return chosen, rng.choice(words.spoken[chosen])
        # A value ends with a word; what follows may be the sentence's own full stop.
        text = re.sub(r"\W+$", "", self._text_value(words.values)) or words.values[0]
        return text, text

    def _text_value(self, values: tuple[str, ...]) -> str:
        """A value from the list, words of several mixed, or made-up words: copying must be the only way to be right."""
        rng = self._rng
        way = rng.random()
        if way < 0.45:
            return rng.choice(values)
        if way < 0.7:
            pool = [word for value in rng.sample(values, min(4, len(values))) for word in value.split()]
            return " ".join(rng.sample(pool, min(len(pool), rng.randint(1, 4))))
        made = [self._made_up() for _ in range(rng.choice([1, 1, 2, 2, 3]))]
        if way < 0.8:
            made.append(rng.choice(rng.choice(values).split()))
        if way < 0.75:
            made.insert(0, str(rng.randint(1, 300)))
        return " ".join(made)

    def _made_up(self) -> str:
        rng = self._rng
        syllables = rng.choice([1, 2, 2, 3])
        word = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(syllables))
        return word.capitalize() if rng.random() < 0.8 else word

    def _joined(self) -> Example:
        """Two commands in one sentence."""
        while True:
            first, second = self._draw_intent_template(), self._draw_intent_template()
            if first.calls[0].action == second.calls[0].action:
                continue
            pieces, calls = self._filled(first)
            more, more_calls = self._filled(second)
            pieces[-1] = Piece(re.sub(r"[\s.,!?;:]+$", "", pieces[-1].text), pieces[-1].slot)
            joiner = self._rng.choice(["", ", ", " "]) if self._rng.random() < 0.12 else " "
            words = self._rng.choice(self._pack.joiners)
            pieces.append(Piece(". " if joiner == "" else f"{joiner}{words} "))
            offset = len(calls)
            for index, piece in enumerate(more):
                text = piece.text if index or piece.slot else lower_first(piece.text)
                pieces.append(Piece(text, piece.slot and (piece.slot[0] + offset, piece.slot[1])))
            if len(_text(pieces)) <= _MAX_JOINED_CHARACTERS:
                return self._example(self._noisy(pieces), calls + more_calls, f"{first.where} + {second.where}")

    def _out_of_range(self) -> Example:
        """A command whose number the action does not allow: it is answered with the range, and nothing is done."""
        intent, template = self._rng.choice(self._ranged)
        name = self._open_range(template)
        assert name is not None
        slot = self._pack.action(intent.action).slots[name]
        assert isinstance(slot, IntegerSlot | NumberSlot)
        pieces = []
        for part in template.parts:
            if not isinstance(part, SlotPart) or part.words is not None:
                pieces.append(Piece(part if isinstance(part, str) else part.words or ""))
            elif part.slot == name:
                pieces.append(Piece(self._beyond(slot)))
            else:
                other = self._pack.action(intent.action).slots[part.slot]
                pieces.append(Piece(self._value(other, self._pack.words[intent.action, part.slot])[1]))
        answer = self._pack.words[intent.action, name].out_of_range
        return Example(_text(self._noisy(pieces)), "refusal", (), (answer,), f"{intent.name} out of range")

    def _beyond(self, slot: IntegerSlot | NumberSlot) -> str:
        rng = self._rng
        step = 1 if isinstance(slot, IntegerSlot) else 10**-slot.decimals
        above = (slot.max + step, slot.max * 2 + 20)
        below = (max(0, slot.min - 40), slot.min - step)
        low, high = below if slot.min > step and rng.random() < 0.4 else above
        if isinstance(slot, IntegerSlot):
            return say_integer(rng.randint(int(low), int(high)), rng)
        return say_number(round(rng.uniform(low, high), slot.decimals), slot.decimals, rng)

    def _noisy(self, pieces: list[Piece]) -> list[Piece]:
        if not self._noise:
            return pieces
        pack = self._pack
        pieces = add_aside(pieces, pack.asides_before, pack.asides_after, self._rng)
        return add_noise(pieces, pack.fillers_before, pack.fillers_after, self._rng)

    def _example(self, pieces: list[Piece], calls: list[Call], source: str) -> Example:
        slots: list[dict[str, SlotValue]] = [dict(call.slots) for call in calls]
        for piece in pieces:
            if piece.slot is not None:
                slots[piece.slot[0]][piece.slot[1]] = piece.text.strip()
        done = tuple(Call(call.action, given) for call, given in zip(calls, slots, strict=True))
        answers = tuple(self._pack.answer(call) for call in done)
        return Example(_text(pieces), "command", done, answers, source)


def held_out_examples(pack: Pack, seed: int = 0) -> list[Example]:
    """Every held-out line once, as it is written; open slots are filled by ``seed``."""
    maker = ExampleMaker(pack, seed)
    commands = [maker.command(template, noise=False) for template in pack.held_out]
    return commands + [
        maker.reply(reply, template, noise=False) for reply in pack.replies for template in reply.held_out
    ]


def _weight(group: Intent | Reply) -> float:
    """The square root: what has many wordings is drawn more often, but not in proportion."""
    return float(len(group.templates) ** 0.5)


def _text(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces).strip()
