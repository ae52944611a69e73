"""Topics as values: what a node listens to, what a topic means, and where a reply may go.

Nothing here talks to a broker.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

from edge_llm.config import NAME_PATTERN
from edge_llm.errors import ConfigError

ROOT: Final = "edge_llm/v1"
MAX_TOPIC_LENGTH: Final = 512
# mosquitto ends the connection at more than 200.
MAX_TOPIC_LEVELS: Final = 32
_NAME: Final = re.compile(NAME_PATTERN.removeprefix("^").removesuffix("$"))
# MQTT forbids wildcards and NUL in a topic that is published to, and brokers hang up on other characters that the
# standard merely discourages (mosquitto: control characters and non-characters); so printable ASCII it is.
_UNUSABLE_IN_TOPIC: Final = re.compile(r"[^\x20-\x7e]|[+#]")

Kind = Literal["query", "partial", "cancel", "feedback", "state"]
_KINDS: Final[dict[str, Kind]] = {
    "query": "query",
    "partial": "partial",
    "cancel": "cancel",
    "feedback": "feedback",
    "state": "state",
}


def is_name(text: str) -> bool:
    """Whether ``text`` may stand for a node, a pool or a user."""
    return _NAME.fullmatch(text) is not None


@dataclass(frozen=True)
class Scope:
    """One family of topics that queries come from: the node's own, or those of its pool."""

    base: str
    pool: str | None = None

    def query(self, user: str) -> str:
        """Where ``user`` asks."""
        return f"{self.base}/query/{user}"

    def partial(self, user: str) -> str:
        """Where ``user``'s transcripts grow."""
        return f"{self.base}/partial/{user}"

    def cancel(self, user: str) -> str:
        """Where ``user`` cancels."""
        return f"{self.base}/cancel/{user}"

    def feedback(self, user: str) -> str:
        """Where ``user`` rates an answer."""
        return f"{self.base}/feedback/{user}"

    def reply(self, user: str, place: str = "default") -> str:
        """A place for replies to ``user``."""
        return f"{self.base}/reply/{user}/{place}"

    def allows_reply(self, user: str, topic: str) -> bool:
        """Whether ``topic`` lies inside this user's own reply topics, where the broker's ACL lets only them read."""
        prefix = f"{self.base}/reply/{user}/"
        return (
            topic.startswith(prefix)
            and len(topic) <= MAX_TOPIC_LENGTH
            and topic.count("/") < MAX_TOPIC_LEVELS
            and _UNUSABLE_IN_TOPIC.search(topic) is None
            and all(topic[len(prefix) :].split("/"))
        )


@dataclass(frozen=True)
class Route:
    """What an incoming topic means. ``user`` may be no valid name: then there is nowhere to reply.

    The last level of ``state`` is the name of a value, and nobody is replied to.
    """

    kind: Kind
    user: str
    scope: Scope

    @property
    def has_valid_user(self) -> bool:
        """The user's level of the topic is a name."""
        return is_name(self.user)


@dataclass(frozen=True)
class Topics:
    """Every topic of one node, and of its pool if it is in one.

    Raises:
        ConfigError: ``node`` is "pool", whose topics would be those of pools.
    """

    node: str
    pool: str | None = None

    def __post_init__(self) -> None:
        for setting, name in (("mqtt.node", self.node), ("mqtt.pool", self.pool)):
            if name is not None and not is_name(name):
                raise ConfigError(f"{setting} {name!r} is not a name of 1 to 64 letters, digits, '_' and '-'")
        if self.node == "pool":
            raise ConfigError("mqtt.node cannot be 'pool': edge_llm/v1/pool/… are the topics of pools")

    @property
    def own(self) -> Scope:
        """The node's own topics."""
        return Scope(f"{ROOT}/{self.node}")

    @property
    def pooled(self) -> Scope | None:
        """The pool's topics."""
        return None if self.pool is None else Scope(f"{ROOT}/pool/{self.pool}", self.pool)

    def state_value(self, name: str) -> str:
        """Where the host publishes a value for answers to use, retained."""
        return f"{self.own.base}/state/{name}"

    @property
    def status(self) -> str:
        """Retained: the node's state, and its last will."""
        return f"{ROOT}/{self.node}/status"

    @property
    def info(self) -> str:
        """Retained: what the node serves."""
        return f"{ROOT}/{self.node}/info"

    @property
    def metrics(self) -> str:
        """Counters and latencies, from time to time."""
        return f"{ROOT}/{self.node}/metrics"

    def subscriptions(self) -> tuple[tuple[str, int], ...]:
        """(topic filter, QoS) of all that a node listens to.

        Cancels are subscribed to with QoS 1, so that the publisher chooses: QoS 1 stays behind its query, QoS 0 is not
        held up when as many queries are in flight as the broker may send.
        """
        base = self.own.base
        levels = {"query": 1, "partial": 0, "cancel": 1, "feedback": 1, "state": 1}
        filters = [(f"{base}/{level}/+", qos) for level, qos in levels.items()]
        if (pooled := self.pooled) is not None:
            filters += [(f"$share/{pooled.pool}/{pooled.base}/query/+", 1), (f"{pooled.base}/cancel/+", 1)]
        return tuple(filters)

    def parse(self, topic: str) -> Route | None:
        """What a topic means to this node, or None if nothing. The pool has queries and cancels only."""
        for scope in (self.own, self.pooled):
            if scope is None or not topic.startswith(scope.base + "/"):
                continue
            kind_level, separator, user = topic[len(scope.base) + 1 :].partition("/")
            kind = _KINDS.get(kind_level)
            if kind is None or not separator or "/" in user:
                continue
            if scope.pool is None or kind in ("query", "cancel"):
                return Route(kind, user, scope)
        return None
