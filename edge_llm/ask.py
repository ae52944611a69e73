"""``edge-llm ask``: a question from the terminal to a running daemon, over MQTT."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from edge_llm.mqtt.asking import Asker

if TYPE_CHECKING:
    from edge_llm.config import MqttConfig

ONLINE_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Question:
    """What to ask and how. None leaves a setting to the bundle; ``timeout_s`` is the longest silence to bear."""

    text: str
    user: str = "cli"
    session: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    timeout_s: float = 60.0


def ask(config: MqttConfig, question: Question, *, as_json: bool) -> int:
    """Stream the answer to stdout; returns 0, or 1 if the daemon answered with an error.

    Args:
        config: the broker, the node and the protocol.
        question: what to ask.
        as_json: print every event as one JSON object a line instead of the text.

    Raises:
        AskError: no broker, no daemon, or no answer.
    """
    with Asker(config, user=question.user) as asker:
        asker.wait_online(ONLINE_TIMEOUT_S)
        events = asker.stream(
            question.text,
            timeout_s=question.timeout_s,
            session=question.session,
            max_tokens=question.max_tokens,
            temperature=question.temperature,
        )
        printed = ""
        for event in events:
            if as_json:
                print(msgspec.json.encode(event).decode(), flush=True)
            elif event["type"] == "delta":
                printed += event["text"]
                print(event["text"], end="", flush=True)
            elif event["type"] == "final":
                # A lost delta costs nothing: the final has the whole text.
                rest = event["text"].removeprefix(printed) if event["text"].startswith(printed) else event["text"]
                print(rest, flush=True)
                for action in event["actions"]:
                    print(format_action(action), file=sys.stderr)
            else:
                print(f"edge-llm: {event['code']} {event['name']}: {event['message']}", file=sys.stderr)
    return 1 if event["type"] == "error" else 0


def format_action(action: dict[str, Any]) -> str:
    """One line for an action of a ``final`` event."""
    slots = "".join(f" {name}={value}" for name, value in action["slots"].items())
    confirm = ", ask back first" if action["confirm"] else ""
    return f"→ {action['name']}{slots} (confidence {action['confidence']:.2f}{confirm})"
