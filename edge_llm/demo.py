"""``edge-llm demo``: a broker, a daemon and some questions, all of it on this machine and stopped at the end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from edge_llm.ask import format_action
from edge_llm.config import MqttConfig
from edge_llm.domain.domain import read_schema
from edge_llm.errors import EdgeLlmError
from edge_llm.local_broker import local_broker
from edge_llm.mqtt.asking import Asker, DaemonOfflineError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edge_llm.bundle.manifest import Bundle
    from edge_llm.config import Config
    from edge_llm.domain.schema import DomainSchema

NODE: Final = "demo"
# The first start packs the weights for this processor, which takes minutes on the smallest boards.
ONLINE_TIMEOUT_S: Final = 600.0
STOP_TIMEOUT_S: Final = 20.0
_QUESTION_WIDTH: Final = 58


@dataclass(frozen=True)
class _Question:
    text: str
    max_tokens: int | None = None
    cancel_after_chars: int | None = None
    remark: str = ""


QUESTIONS: Final = (
    _Question("What is artificial intelligence?"),
    _Question("How to implement a real-time question answering system?"),
    _Question("What is deep learning?"),
    _Question("Tell me a long story about a lighthouse keeper.", cancel_after_chars=120, remark="cancelled half-way"),
    _Question("What is deep learning?", remark="asked again"),
    _Question("Why is the sky blue?", max_tokens=40, remark="at most 40 tokens"),
)


@dataclass(frozen=True)
class _Row:
    """One line of the table. Times are milliseconds as the client saw them, broker included."""

    question: _Question
    final: dict[str, Any]
    first_text_ms: float | None
    total_ms: float


def demo(config: Config, bundle: Bundle, *, interactive: bool) -> int:
    """Run it; returns 0.

    Raises:
        EdgeLlmError: no broker can be started, or the daemon did not come online (its last log line is in the message).
    """
    # The same way out as Ctrl-C, so that broker and daemon end with us.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="edge-llm-demo-") as temporary:
        folder = Path(temporary)
        with local_broker(folder) as broker, _daemon(config, bundle, broker.port, folder) as daemon:
            mqtt = MqttConfig(port=broker.port, node=NODE)
            print(f"broker    {broker.name} on 127.0.0.1:{broker.port}")
            print(f"daemon    edge-llm serve --bundle {bundle.path} (process {daemon.pid})", flush=True)
            with Asker(mqtt, user="demo") as asker:
                started = time.monotonic()
                _wait_online(asker, daemon, folder)
                print(f"online    after {time.monotonic() - started:.1f} s", flush=True)
                schema = read_schema(bundle)
                for name, value in ({} if schema is None else schema.state).items():
                    if value.example is not None:
                        asker.publish_state(name, value.example)
                if interactive:
                    _converse(asker)
                else:
                    _print_table([_ask(asker, question) for question in _questions(schema)])
    return 0


def _questions(schema: DomainSchema | None) -> tuple[_Question, ...]:
    """What to ask: a domain model knows its own pack and nothing else."""
    if schema is None or not schema.examples:
        return QUESTIONS
    asked = tuple(_Question(text) for text in schema.examples)
    return (*asked, _Question(schema.examples[0], remark="asked again"))


@contextlib.contextmanager
def _daemon(config: Config, bundle: Bundle, port: int, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """``edge-llm serve`` as a process of its own, with this command's settings."""
    settings = msgspec.to_builtins(config)
    command = [sys.executable, "-m", "edge_llm.cli", "serve", "--bundle", str(bundle.path.resolve())]
    command += ["--port", str(port), "--host", "127.0.0.1", "--node", NODE, "--log-format", "text"]
    command += ["--device", config.device]
    for table in ("engine", "serving", "cache", "prefetch", "power"):
        given = {key: value for key, value in settings[table].items() if value is not None}
        command += [f"--set={table}.{key}={_toml(value)}" for key, value in given.items()]
    # Answers of an earlier demo would make this one look faster than it is.
    command += [f"--set=state_dir={_toml(str(folder))}"]
    if config.cache_dir is not None:
        command += [f"--set=cache_dir={_toml(config.cache_dir)}"]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("EDGE_LLM_")}
    with (folder / "daemon.log").open("wb") as log:
        # In a session of its own: Ctrl-C in the terminal stops an answer, not the daemon.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environ, start_new_session=True
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    # A JSON string, number, boolean or list of them is TOML too.
    return msgspec.json.encode(value).decode()


def _wait_online(asker: Asker, daemon: subprocess.Popen[bytes], folder: Path) -> None:
    give_up_at = time.monotonic() + ONLINE_TIMEOUT_S
    while True:
        try:
            asker.wait_online(0.5)
            return
        except DaemonOfflineError as error:
            if daemon.poll() is not None or time.monotonic() > give_up_at:
                lines = (folder / "daemon.log").read_text(errors="replace").strip().splitlines()
                raise EdgeLlmError(f"the daemon did not come online: {lines[-1] if lines else error}") from None


def _ask(asker: Asker, question: _Question) -> _Row:
    print(f"\n> {question.text}{f'  ({question.remark})' if question.remark else ''}")
    started = time.monotonic()
    first_text_ms = None
    cancelled = False
    shown = ""
    query_id = asker.send(question.text, max_tokens=question.max_tokens)
    for event in asker.events(query_id):
        if event["type"] == "error":
            raise EdgeLlmError(f"the daemon answered {event['code']} {event['name']}: {event['message']}")
        if first_text_ms is None:
            first_text_ms = (time.monotonic() - started) * 1e3
        new = event["text"] if event["type"] == "delta" else event["text"].removeprefix(shown)
        shown += new
        print(new, end="", flush=True)
        if question.cancel_after_chars is not None and len(shown) >= question.cancel_after_chars and not cancelled:
            asker.cancel(query_id)
            cancelled = True
    print()
    for action in event["actions"]:
        print(format_action(action))
    return _Row(question, event, first_text_ms, (time.monotonic() - started) * 1e3)


def _converse(asker: Asker) -> None:
    print("Ask away; Ctrl-C stops an answer, Ctrl-D leaves.")
    while True:
        try:
            text = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not text:
            continue
        try:
            for event in asker.stream(text, session="demo"):
                if event["type"] == "delta":
                    print(event["text"], end="", flush=True)
                elif event["type"] == "error":
                    print(f"{event['code']} {event['name']}: {event['message']}", end="")
            print()
            for action in event.get("actions", ()):
                print(format_action(action))
        except KeyboardInterrupt:
            print(" [stopped]")


def _print_table(rows: list[_Row]) -> None:
    head = ("question", "prompt", "answer", "first text", "ms/token", "total", "ended by", "source")
    layout = f"{{:<{_QUESTION_WIDTH}}} {{:>7}} {{:>7}} {{:>11}} {{:>9}} {{:>9}}  {{:<9}}  {{}}"
    print("\n" + layout.format(*head))
    for row in rows:
        usage, timing = row.final["usage"], row.final["timing"]
        later_tokens = usage["completion_tokens"] - 1
        ms_per_token = (timing["total_ms"] - timing["queue_ms"] - timing["prefill_ms"]) / max(1, later_tokens)
        first = "-" if row.first_text_ms is None else f"{row.first_text_ms:.0f} ms"
        print(
            layout.format(
                row.question.text[:_QUESTION_WIDTH],
                usage["prompt_tokens"],
                usage["completion_tokens"],
                first,
                f"{ms_per_token:.1f}" if row.final["source"] == "model" else "-",
                f"{row.total_ms / 1e3:.2f} s",
                row.final["finish_reason"],
                row.final["source"],
            )
        )
    print("\nFirst text and total are what the client saw over MQTT, from publishing to receiving.")
