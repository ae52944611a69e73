"""What the users of a soak do: plain questions, speech, changes of mind, and messages that nobody should send."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from benchmarks.serving import NODE
from benchmarks.voice.words import USERS, say

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Mapping

BASE: Final = f"edge_llm/v1/{NODE}"
# A name that the broker lets in and that stands for no user: there is nowhere to reply to.
ODD_USER: Final = "odd user"
# How often each act comes, of 100.
SHARES: Final[Mapping[str, int]] = {
    "new": 24,
    "repeated": 20,
    "session": 10,
    "messages": 4,
    "sampled": 5,
    "spoken": 14,
    "abandoned": 3,
    "background": 4,
    "deadline": 4,
    "cancelled": 3,
    "superseded": 2,
    "twice": 2,
    "vanished": 2,
    "bad": 3,
}
# Those whose latency counts: asked by somebody who waits, and answered to the end.
PLAIN_KINDS: Final = frozenset({"new", "repeated", "session", "messages", "sampled", "spoken"})
_KNOWN_TEXTS: Final = 20
_TURNS: Final = 6
_WORD_S: Final = 0.4
_DEADLINES_MS: Final = (1, 5, 20, 100, 2000)
_LONG_TOKENS: Final = 120
# Over serving.max_payload_bytes, and under what the broker takes.
_OVERSIZED_BYTES: Final = 20_000


@dataclass(frozen=True)
class Message:
    """One message of an act.

    Attributes:
        after_s: seconds after the act began.
        topic, payload, qos, content_type: as published.
        kind: of the query.
        query_id: of the query whose terminal event is due; it travels as CorrelationData. None if none is due.
        passing: published through a connection that vanishes without a goodbye, not through the user's standing one.
        connection_user: of a passing connection, if it is another user's.
    """

    after_s: float
    topic: str
    payload: bytes
    kind: str
    qos: int = 1
    content_type: str | None = None
    query_id: str | None = None
    passing: bool = False
    connection_user: str | None = None


class ActMaker:
    """Thinks up what one user does next.

    Args:
        user: the name.
        domain: what the user speaks of (benchmarks/voice/words.py).
        rng: decides everything.
    """

    def __init__(self, user: str, domain: str, rng: random.Random) -> None:
        self._user = user
        self._domain = domain
        self._rng = rng
        self._known = [self._say() for _ in range(_KNOWN_TEXTS)]
        self._count = 0
        self._turns = 0
        self._elsewhere = f"{BASE}/reply/{user}/other"
        self._bad_inputs = self._make_bad_inputs()

    def next(self) -> list[Message]:
        """An act, drawn by ``SHARES``."""
        return self.make(self._rng.choices(list(SHARES), list(SHARES.values()))[0])

    def make(self, kind: str) -> list[Message]:
        """An act of one kind."""
        act: Callable[[], list[Message]] = getattr(self, f"_{kind}")
        return act()

    def rate(self, query_id: str) -> Message:
        """A rating of a finished answer."""
        body = {"id": query_id, "rating": self._rng.choice((-1, 0, 1)), "reply_to": self._elsewhere}
        return Message(0.0, f"{BASE}/feedback/{self._user}", _json(body), "feedback")

    # -- questions ----------------------------------------------------------------------------------------------------

    def _new(self) -> list[Message]:
        return [self._query("new", {"text": self._say()})]

    def _repeated(self) -> list[Message]:
        return [self._query("repeated", {"text": self._rng.choice(self._known)})]

    def _session(self) -> list[Message]:
        self._turns += 1
        return [self._query("session", {"text": self._say(), "session": f"talk-{self._turns // _TURNS}"})]

    def _messages(self) -> list[Message]:
        said = [("user", self._say()), ("assistant", "All right."), ("user", self._say())]
        return [self._query("messages", {"messages": [{"role": role, "content": text} for role, text in said]})]

    def _sampled(self) -> list[Message]:
        fields = {"text": self._say(), "temperature": 0.8, "top_p": 0.9, "seed": self._rng.randrange(1000)}
        return [self._query("sampled", {**fields, "cache": "bypass", "stream": False})]

    def _background(self) -> list[Message]:
        return [self._query("background", {"text": self._say(), "priority": "background"})]

    def _deadline(self) -> list[Message]:
        return [self._query("deadline", {"text": self._say(), "deadline_ms": self._rng.choice(_DEADLINES_MS)})]

    def _twice(self) -> list[Message]:
        first = self._query("twice", {"text": self._say()})
        return [first, _later(first, self._rng.choice((0.0, 0.01, 1.0)))]

    # -- speech -------------------------------------------------------------------------------------------------------

    def _spoken(self) -> list[Message]:
        text = self._rng.choice(self._known) if self._rng.random() < 0.5 else self._say()
        utterance, partials, spoken_s = self._speak(text)
        return [*partials, _later(self._query("spoken", {"text": text, "utterance": utterance}), spoken_s)]

    def _abandoned(self) -> list[Message]:
        return self._speak(self._say())[1]

    def _speak(self, text: str) -> tuple[str, list[Message], float]:
        """An utterance's name, a partial after each word but the last, and how long all takes."""
        words = text.split()
        utterance = self._id()
        topic = f"{BASE}/partial/{self._user}"
        partials = [
            Message(
                count * _WORD_S,
                topic,
                _json({"utterance": utterance, "seq": count, "text": " ".join(words[:count])}),
                "partial",
                qos=0,
            )
            for count in range(1, len(words))
        ]
        return utterance, partials, len(words) * _WORD_S

    # -- changes of mind ----------------------------------------------------------------------------------------------

    def _cancelled(self) -> list[Message]:
        query = self._query("cancelled", {"text": self._say(), "max_tokens": _LONG_TOKENS, "cache": "bypass"})
        cancel = _json({"id": query.query_id, "reply_to": self._elsewhere})
        return [query, Message(self._rng.uniform(0, 0.03), f"{BASE}/cancel/{self._user}", cancel, "cancel")]

    def _superseded(self) -> list[Message]:
        old = self._query("superseded", {"text": self._say(), "max_tokens": _LONG_TOKENS, "cache": "bypass"})
        new = self._query("superseding", {"text": self._say(), "supersedes": old.query_id})
        return [old, _later(new, self._rng.uniform(0, 0.03))]

    def _vanished(self) -> list[Message]:
        fields = {"text": self._say(), "max_tokens": _LONG_TOKENS, "cache": "bypass"}
        return [_passing(self._query("vanished", fields))]

    # -- bad input ----------------------------------------------------------------------------------------------------

    def _bad(self) -> list[Message]:
        return self._rng.choice(self._bad_inputs)()

    def _make_bad_inputs(self) -> list[Callable[[], list[Message]]]:
        """Each makes a message that is refused with the code in its kind, or one that nobody answers."""
        refused: list[tuple[int, bytes]] = [
            (400, b'{"text": "Turn on the li'),
            (400, b'{"text": 5}'),
            (400, b'{"text": "Turn on the light", "max_tokens": "many"}'),
            (400, b'{"text": "Turn on the light", "colour": "red"}'),
            (400, b'{"text": "  "}'),
            (400, b'{"text": "Turn on the light", "temperature": NaN}'),
            (400, b'{"text": ' + b"[" * 5000 + b"]" * 5000 + b"}"),
            (400, b"\xff\xfe\x00turn on the light"),
            (413, _json({"text": "x" * _OVERSIZED_BYTES})),
            (413, _json({"text": "where are we going " * 500})),
            (403, _json({"text": "Turn on the light", "reply_to": f"{BASE}/reply/somebody-else/default"})),
        ]
        return [
            *(lambda code=code, payload=payload: [self._refused(code, payload)] for code, payload in refused),
            lambda: [self._refused(415, b"Turn on the light", content_type="image/png")],
            self._unknown_cancel,
            self._reused_id,
            lambda: [Message(0.0, f"{BASE}/partial/{self._user}", b'{"utterance": 7, "seq": -1}', "partial", qos=0)],
            lambda: [Message(0.0, f"{BASE}/nonsense/{self._user}", b"{}", "unknown_topic")],
            lambda: [Message(0.0, f"edge_llm/v1/nobody/query/{self._user}", b"hello", "unknown_topic")],
            lambda: [_passing(Message(0.0, f"{BASE}/query/{ODD_USER}", b"hello", "odd_user"), ODD_USER)],
        ]

    def _refused(self, code: int, payload: bytes, content_type: str | None = None) -> Message:
        query_id = self._id()
        topic = f"{BASE}/query/{self._user}"
        return Message(0.0, topic, payload, f"bad_{code}", content_type=content_type, query_id=query_id)

    def _unknown_cancel(self) -> list[Message]:
        cancel = _json({"id": "never-asked", "reply_to": self._elsewhere})
        return [Message(0.0, f"{BASE}/cancel/{self._user}", cancel, "cancel")]

    def _reused_id(self) -> list[Message]:
        """The second body under one id is refused, elsewhere: the answer of the first is the id's terminal event."""
        first = self._query("new", {"text": self._say()})
        other = _json({"id": first.query_id, "text": self._say(), "reply_to": self._elsewhere})
        return [first, Message(0.5, first.topic, other, "reused_id")]

    # -- small things -------------------------------------------------------------------------------------------------

    def _say(self) -> str:
        return say(self._rng, self._domain)

    def _id(self) -> str:
        self._count += 1
        return f"{self._user}-{self._count}"

    def _query(self, kind: str, fields: dict[str, Any]) -> Message:
        query_id = self._id()
        payload = _json({"id": query_id, **fields})
        return Message(0.0, f"{BASE}/query/{self._user}", payload, kind, query_id=query_id)


def domain_of(number: int) -> str:
    """What the ``number``-th user speaks of."""
    return list(USERS.values())[number % len(USERS)]


def _later(message: Message, seconds: float) -> Message:
    return replace(message, after_s=seconds)


def _passing(message: Message, user: str | None = None) -> Message:
    return replace(message, passing=True, connection_user=user)


def _json(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()
