"""One load process: some users who ask, and a note of every query that ends.

    python -m benchmarks.soak.load PORT PROCESS QUERIES_PER_SECOND USER:NUMBER…

Prints records (records.py). A line on standard input, or its end, ends the load: what is unanswered then is waited for.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
import random
import signal
import socket
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from benchmarks.soak.acts import BASE, PLAIN_KINDS, ActMaker, Message, domain_of
from benchmarks.soak.broker import connect, make_client
from benchmarks.soak.records import Again, Counts, Done, Lost, Record, to_line

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from paho.mqtt.client import Client, MQTTMessage

# A query that has waited longer than this when the broker comes back was lost before: it is not sent again.
OVERDUE_S: Final = 60.0
# At the end, what is unanswered is waited for as long as answers come, with pauses up to this, but not for ever.
DRAIN_PAUSE_S: Final = 60.0
MAX_DRAIN_S: Final = 900.0
_CONNECT_TIMEOUT_S: Final = 20.0
_PASSING_TIMEOUT_S: Final = 5.0
_COUNTS_INTERVAL_S: Final = 5.0
_TICK_S: Final = 0.2
# Of the plain answers, one in so many is rated.
_RATED: Final = 20
_STATUS_TOPIC: Final = f"{BASE}/status"


@dataclass
class _Pending:
    """A query without a terminal event; the times are of the first publication and of the last."""

    message: Message
    sent_at: float
    last_sent_at: float
    sends: int = 1
    first_at: float | None = None


@dataclass
class _Finished:
    """A query that has its terminal event: what both were, and how many times it was published and answered."""

    kind: str
    digest: bytes
    retriable: bool
    sends: int
    terminals: int = 1


class Notes:
    """What the users of this process have done: records on standard output, and counts. Thread-safe."""

    def __init__(self, process: int) -> None:
        self._process = process
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def count(self, name: str) -> None:
        """Add one."""
        with self._lock:
            self._counts[name] += 1

    def write(self, record: Record) -> None:
        """Print a record."""
        with self._lock:
            sys.stdout.buffer.write(to_line(record))
            sys.stdout.buffer.flush()

    def write_counts(self) -> None:
        """Print what has been counted so far."""
        with self._lock:
            counts = dict(self._counts)
        self.write(Counts(process=self._process, counts=counts))


class User:
    """Publishes what a user does, and sees what comes back.

    Like a client of docs/contract.md it asks again what is unanswered when the daemon, or the broker, has been away.

    Args:
        name: the user's.
        acts: says what the user does.
        notes: where all is noted.
        port: of the broker.
    """

    def __init__(self, name: str, acts: ActMaker, notes: Notes, port: int) -> None:
        self.acts = acts
        self._name = name
        self._notes = notes
        self._port = port
        self._lock = threading.Lock()
        self._pending: dict[str, _Pending] = {}
        self._finished: dict[str, _Finished] = {}
        self._subscribed = threading.Event()
        self._default = f"{BASE}/reply/{name}/default"
        topics = (f"{BASE}/reply/{name}/#", _STATUS_TOPIC)
        self._client = make_client(name, self._on_message, topics, self._subscribed.set)

    def connect(self) -> None:
        """Connect and subscribe. Raises ``OSError``."""
        connect(self._client, self._port)
        if not self._subscribed.wait(_CONNECT_TIMEOUT_S):
            raise TimeoutError(f"the broker did not let {self._name} subscribe")

    def close(self) -> None:
        """Disconnect."""
        self._client.disconnect()
        self._client.loop_stop()

    def send(self, message: Message) -> None:
        """Publish, and expect the terminal event if one is due."""
        self._notes.count(f"sent_{message.kind}")
        if message.query_id is not None:
            self._expect(message)
        if message.passing:
            threading.Thread(target=self._send_passing, args=(message,), daemon=True).start()
        else:
            _publish(self._client, message)

    def unanswered(self) -> list[Lost]:
        """The queries that have no terminal event."""
        with self._lock:
            waiting = list(self._pending.items())
        return [Lost(id=key, kind=pending.message.kind, sent_at=pending.sent_at) for key, pending in waiting]

    def _expect(self, message: Message) -> None:
        assert message.query_id is not None
        now = time.monotonic()
        with self._lock:
            if (finished := self._finished.get(message.query_id)) is not None:
                finished.sends += 1
            elif (pending := self._pending.get(message.query_id)) is not None:
                pending.sends += 1
            else:
                self._pending[message.query_id] = _Pending(message, now, now)

    def _send_passing(self, message: Message) -> None:
        """Publish through a connection of its own, which is cut as soon as the broker has the message."""
        subscribed, delivered = threading.Event(), threading.Event()
        user = message.connection_user or self._name
        topic = f"{BASE}/reply/{user}/default"
        client = make_client(user, lambda _message: None, (topic,), subscribed.set, comes_back=False)
        client.on_publish = lambda *_: delivered.set()
        try:
            connect(client, self._port)
        except OSError:  # the broker is away; a query is sent again through the standing connection
            self._notes.count("passing_refused")
            return
        if subscribed.wait(_PASSING_TIMEOUT_S):
            _publish(client, message)
            delivered.wait(_PASSING_TIMEOUT_S)
        _cut(client)
        client.loop_stop()

    # -- on the client's thread ---------------------------------------------------------------------------------------

    def _on_message(self, message: MQTTMessage) -> None:
        event: dict[str, Any] = json.loads(message.payload)
        if message.topic == _STATUS_TOPIC:
            if event["state"] == "online":
                self._ask_again()
        elif message.topic != self._default:
            self._notes.count("replies_elsewhere")
        elif event["type"] == "delta":
            self._take_delta(event["id"], message.timestamp)
        else:
            self._take_terminal(event, message)

    def _ask_again(self) -> None:
        now = time.monotonic()
        messages = []
        with self._lock:
            for pending in self._pending.values():
                if now - pending.last_sent_at < OVERDUE_S:
                    pending.sends += 1
                    pending.last_sent_at = now
                    messages.append(pending.message)
        for message in messages:
            self._notes.count("sent_again")
            _publish(self._client, message)

    def _take_delta(self, query_id: str, at: float) -> None:
        self._notes.count("deltas")
        with self._lock:
            pending = self._pending.get(query_id)
            if pending is not None and pending.first_at is None:
                pending.first_at = at

    def _take_terminal(self, event: dict[str, Any], message: MQTTMessage) -> None:
        query_id, at = event["id"], message.timestamp
        digest = hashlib.blake2b(message.payload, digest_size=16).digest()
        with self._lock:
            pending = self._pending.pop(query_id, None)
            finished = self._finished.get(query_id)
            if pending is not None:
                self._finished[query_id] = _Finished(
                    pending.message.kind, digest, event.get("retriable", False), pending.sends
                )
            elif finished is not None:
                finished.terminals += 1
        if pending is not None:
            done = _done(query_id, pending, event, at)
            self._notes.write(done)
            self._rate(done)
        elif finished is not None:
            note = Again(
                id=query_id,
                kind=finished.kind,
                at=at,
                same=finished.digest == digest,
                asked_for=finished.terminals <= finished.sends,
                refused=finished.retriable or event.get("retriable", False),
            )
            self._notes.write(note)
        else:
            self._notes.count("terminals_of_nothing")

    def _rate(self, done: Done) -> None:
        if done.kind in PLAIN_KINDS and done.outcome == "final_stop" and hash(done.sent_at) % _RATED == 0:
            self._notes.count("sent_feedback")
            _publish(self._client, self.acts.rate(done.id))


def run(users: Sequence[User], rate: float, notes: Notes, stop: threading.Event, rng: random.Random) -> None:
    """Let the users act, ``rate`` times a second in all at random moments (a Poisson process), until ``stop`` is set.

    What an act still wanted to send by then is not sent.
    """
    due: list[tuple[float, int, User, Message]] = []
    numbers = itertools.count()
    act_at = time.monotonic() + rng.expovariate(rate)
    counts_at = 0.0
    while not stop.is_set():
        now = time.monotonic()
        while act_at <= now:
            user = rng.choice(users)
            for message in user.acts.next():
                heapq.heappush(due, (act_at + message.after_s, next(numbers), user, message))
            act_at += rng.expovariate(rate)
        while due and due[0][0] <= now:
            _, _, user, message = heapq.heappop(due)
            user.send(message)
        if now >= counts_at:
            notes.write_counts()
            counts_at = now + _COUNTS_INTERVAL_S
        next_at = min(act_at, due[0][0]) if due else act_at
        stop.wait(min(_TICK_S, max(0.0, next_at - time.monotonic())))


def drain(users: Sequence[User], notes: Notes) -> None:
    """Wait for what is unanswered, and note what stays so."""
    began = last_at = time.monotonic()
    waiting = -1
    while (count := sum(len(user.unanswered()) for user in users)) > 0:
        now = time.monotonic()
        if count != waiting:
            waiting, last_at = count, now
        if now - last_at > DRAIN_PAUSE_S or now - began > MAX_DRAIN_S:
            break
        time.sleep(_TICK_S)
    time.sleep(_TICK_S)  # a second terminal event would come close behind the first
    for user in users:
        for lost in user.unanswered():
            notes.write(lost)
    notes.write_counts()


def main(arguments: Sequence[str]) -> int:
    """Connect, act, drain."""
    port, process, rate = int(arguments[0]), int(arguments[1]), float(arguments[2])
    notes = Notes(process)
    users = []
    for argument in arguments[3:]:
        name, _, number = argument.partition(":")
        acts = ActMaker(name, domain_of(int(number)), random.Random(int(number)))
        users.append(User(name, acts, notes, port))
    for user in users:
        user.connect()
    stop = threading.Event()
    threading.Thread(target=_stop_when_told, args=(stop.set,), daemon=True).start()
    run(users, rate, notes, stop, random.Random(f"soak-{process}"))
    drain(users, notes)
    for user in users:
        user.close()
    return 0


def _stop_when_told(stop: Callable[[], None]) -> None:
    sys.stdin.readline()
    stop()


def _done(query_id: str, pending: _Pending, event: dict[str, Any], at: float) -> Done:
    outcome = f"final_{event['finish_reason']}" if event["type"] == "final" else f"error_{event['code']}"
    first_at = at if pending.first_at is None else pending.first_at
    return Done(
        id=query_id,
        kind=pending.message.kind,
        sent_at=pending.sent_at,
        first_ms=round((first_at - pending.sent_at) * 1e3, 3),
        answer_ms=round((at - pending.sent_at) * 1e3, 3),
        outcome=outcome,
        sends=pending.sends,
    )


def _publish(client: Client, message: Message) -> None:
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    if message.query_id is not None:
        properties.CorrelationData = message.query_id.encode()
    if message.content_type is not None:
        properties.ContentType = message.content_type
    # QoS 1 waits in the client while the broker is away; a partial is then lost, as it may be.
    client.publish(message.topic, message.payload, message.qos, properties=properties)


def _cut(client: Client) -> None:
    """End a connection as a crash does: no DISCONNECT."""
    connection: Any = client.socket()
    if connection is not None:
        try:
            connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return


if __name__ == "__main__":
    # Ctrl-C in the terminal is for the process that started this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(main(sys.argv[1:]))
