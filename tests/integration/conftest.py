"""Daemons as processes of their own, and a bundle slow enough that things can happen during an answer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_llm.config import MqttConfig
from edge_llm.mqtt.asking import Asker
from tests.generate_tiny_bundle import random_checkpoint, write_bundle
from tests.paths import TINY_BUNDLE

START_TIMEOUT_S = 60


class Daemon:
    """``edge-llm serve`` as a process."""

    def __init__(self, bundle: Path, port: int, folder: Path, *settings: str, node: str = "edge") -> None:
        self.log_path = folder / f"{node}.log"
        self.node = node
        self._command = [sys.executable, "-m", "edge_llm.cli", "serve", "--bundle", str(bundle), "--node", node]
        settings = ("engine.threads=1", f"cache_dir={folder / 'cache'}", "serving.max_tokens=2048", *settings)
        self._command += ["--port", str(port)]
        self._command += [part for setting in settings for part in ("--set", setting)]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Daemon:
        with self.log_path.open("ab") as log:
            environ = {name: value for name, value in os.environ.items() if not name.startswith("EDGE_LLM_")}
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log, env=environ)
        return self

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def stop(self, timeout_s: float = 30) -> int:
        """SIGTERM; returns the exit status."""
        return self._end(signal.SIGTERM, timeout_s)

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def _end(self, how: signal.Signals, timeout_s: float = 30) -> int:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(how)
            try:
                self.process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                raise
        return self.process.returncode


@pytest.fixture
def start_daemon(tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """Starts daemons; they are killed at the end of the test if they still run."""
    started: list[Daemon] = []

    def start(port: int, *settings: str, bundle: Path = TINY_BUNDLE, node: str = "edge") -> Daemon:
        daemon = Daemon(bundle, port, tmp_path, *settings, node=node).start()
        started.append(daemon)
        return daemon

    yield start
    for daemon in started:
        daemon.kill()


@pytest.fixture
def connect() -> Iterator[Callable[..., Asker]]:
    """Makes clients that wait for the daemon to be online."""
    made: list[Asker] = []

    def connect(port: int, *, user: str = "ann", node: str = "edge", online: bool = True, **fields) -> Asker:
        asker = Asker(MqttConfig(port=port, node=node, **fields.pop("mqtt", {})), user=user, **fields).connect()
        made.append(asker)
        if online:
            asker.wait_online(START_TIMEOUT_S)
        return asker

    yield connect
    for asker in made:
        asker.close()


@pytest.fixture(scope="session")
def slow_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 whose answers take seconds and do not end by themselves: a long context, and no stop token."""
    out = tmp_path_factory.mktemp("slow") / "bundle"
    checkpoint = random_checkpoint(num_layers=6, num_heads=6, hidden_size=384, context_length=2048, endless=True)
    # Random weights are hard to quantise, and nobody reads the answers.
    write_bundle(checkpoint, out, max_perplexity_ratio=10.0)
    return out
