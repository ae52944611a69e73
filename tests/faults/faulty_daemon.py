"""``edge-llm serve`` with faults that a test switches on and off while it runs, by files in the folder ``$FAULTS``:

- ``slow``: every run of the graph takes so many seconds longer, so that a query still runs when something happens;
- ``raise``: the next run raises the exception of that name, once;
- ``clock``: the wall clock is so many seconds ahead;
- ``packing``: the process that packs a graph ends by the signal of that number.

Answers do not end by themselves. ``busy_ms`` gets two numbers for each 429: the milliseconds from its receipt until the
link had its answer, and until that left for the socket.

    python -m tests.faults.faulty_daemon serve …
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

FAULTS = Path(os.environ["FAULTS"])
_real_time = time.time


def setting(name: str, default: float = 0.0) -> float:
    try:
        return float((FAULTS / name).read_text() or default)
    except (FileNotFoundError, ValueError):
        return default


# Before anything is imported that keeps a reference to it.
time.time = lambda: _real_time() + setting("clock")

from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException  # noqa: E402
from paho.mqtt.client import Client  # noqa: E402

from edge_llm import cli  # noqa: E402
from edge_llm.bundle import prepare  # noqa: E402
from edge_llm.engine.engine import Engine  # noqa: E402
from edge_llm.engine.runner import Runner  # noqa: E402
from edge_llm.mqtt.client import MqttLink  # noqa: E402
from edge_llm.mqtt.gateway import Gateway  # noqa: E402

EXCEPTIONS: dict[str, type[Exception]] = {
    "MemoryError": MemoryError,
    "RuntimeException": RuntimeException,
    "OSError": OSError,
}


def before(owner: type, method: str, act: Any) -> None:
    original = getattr(owner, method)

    def acting(self: Any, *arguments: Any, **options: Any) -> Any:
        act(*arguments, **options)
        return original(self, *arguments, **options)

    setattr(owner, method, acting)


def before_run(*_arguments: Any, **_options: Any) -> None:
    wanted = FAULTS / "raise"
    if wanted.exists():
        name = wanted.read_text()
        wanted.unlink()
        raise EXCEPTIONS[name]("told to fail")
    if delay_s := setting("slow"):
        time.sleep(delay_s)


def packing_may_crash() -> None:
    original = prepare.subprocess.run

    def run(command: list[str], **options: Any) -> Any:
        if number := int(setting("packing")):
            command = [sys.executable, "-c", f"import os; os.kill(os.getpid(), {number})"]
        return original(command, **options)

    prepare.subprocess.run = run  # type: ignore[assignment]


def endless() -> None:
    original = Engine.__init__

    def init(self: Any, runner: Any, stop_ids: Any, *arguments: Any, **options: Any) -> None:
        original(self, runner, [], *arguments, **options)

    Engine.__init__ = init  # type: ignore[method-assign]


received: dict[tuple[str, str], float] = {}
decided: dict[tuple[str, str], float] = {}
busy = (FAULTS / "busy_ms").open("a", buffering=1)


def note_receipt(incoming: Any, *_rest: Any) -> None:
    if b'"id"' in incoming.payload:
        user = incoming.topic.rsplit("/", 1)[-1]
        received[user, json.loads(incoming.payload)["id"]] = incoming.received_at


def note_decision(message: Any) -> None:
    if b'"code":429' in message.payload:
        decided[_key(message.topic, message.payload)] = time.monotonic()


def note_publication(topic: str, payload: bytes, *_rest: Any, **_options: Any) -> None:
    if b'"code":429' in payload:
        key = _key(topic, payload)
        busy.write(f"{(decided[key] - received[key]) * 1000:.3f} {(time.monotonic() - received[key]) * 1000:.3f}\n")


def _key(topic: str, payload: bytes) -> tuple[str, str]:
    return topic.split("/")[4], json.loads(payload)["id"]


if __name__ == "__main__":
    before(Runner, "prefill", before_run)
    before(Runner, "decode", before_run)
    before(Gateway, "_on_message", note_receipt)
    before(MqttLink, "publish", note_decision)
    before(Client, "publish", note_publication)
    packing_may_crash()
    endless()
    sys.exit(cli.main())
