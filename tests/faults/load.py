"""Clients of one load process: each connects, sends its queries in one burst, and counts what comes back.

    python -m tests.faults.load PORT FIRST_CLIENT CLIENTS QUERIES

Prints ``ready`` when all are subscribed, sends when a line comes on stdin, prints ``answered`` when every query has a
terminal event, and, after another line on stdin, how many have none or more than one, and the codes (0: a final).
"""

from __future__ import annotations

import json
import sys
import threading
from collections import Counter
from typing import Any

from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

TIMEOUT_S = 500.0


class Load:
    def __init__(self, port: int, users: list[str], queries: int) -> None:
        self._ids = {(user, f"q{number}") for user in users for number in range(queries)}
        self._lock = threading.Lock()
        self._ready = threading.Semaphore(0)
        self._done = threading.Event()
        self._events: Counter[tuple[str, str]] = Counter()
        self._codes: Counter[int] = Counter()
        self._clients = {user: self._connect(user, port) for user in users}
        for _ in users:
            assert self._ready.acquire(timeout=TIMEOUT_S)

    def _connect(self, user: str, port: int) -> Client:
        client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
        client.max_inflight_messages_set(0)
        client.on_connect = lambda client, *_: client.subscribe(f"edge_llm/v1/edge/reply/{user}/#", 1)
        client.on_subscribe = lambda *_: self._ready.release()
        client.on_message = self._note
        client.connect("127.0.0.1", port, keepalive=600)
        client.loop_start()
        return client

    def _note(self, _client: Client, _data: object, message: Any) -> None:
        event = json.loads(message.payload)
        if event["type"] == "delta":
            return
        with self._lock:
            self._events[message.topic.split("/")[4], event["id"]] += 1
            self._codes[event.get("code", 0)] += 1
            if len(self._events) == len(self._ids):
                self._done.set()

    def send(self) -> None:
        # One query of each client in turn: that is what 200 clients at once look like to the broker.
        for user, name in sorted(self._ids, key=lambda key: key[1]):
            body = {"id": name, "text": f"{name} of {user}", "max_tokens": 8, "stream": False, "cache": "bypass"}
            self._clients[user].publish(f"edge_llm/v1/edge/query/{user}", json.dumps(body), 1)

    def wait(self) -> None:
        self._done.wait(TIMEOUT_S)

    def report(self) -> dict[str, Any]:
        with self._lock:
            missing = len(self._ids - self._events.keys())
            twice = sum(count > 1 for count in self._events.values())
            return {"missing": missing, "twice": twice, "codes": self._codes}


def main(port: int, first: int, clients: int, queries: int) -> None:
    load = Load(port, [f"u{number}" for number in range(first, first + clients)], queries)
    print("ready", flush=True)
    sys.stdin.readline()
    load.send()
    load.wait()
    print("answered", flush=True)
    sys.stdin.readline()
    print(json.dumps(load.report()), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:5]))
