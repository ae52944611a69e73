"""The peer's rows: the same trace and the same token ids through llama.cpp in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks.lineup import lineup
from benchmarks.voice.client import UNHEARD_S, OthersShare, Sample
from benchmarks.voice.modes import MAX_TOKENS, WARM_UP_TEXT, WARM_UPS, ModeRun, progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.voice.prompts import Prompts
    from benchmarks.voice.trace import Utterance
    from edge_llm.bundle.manifest import Bundle

PEER: Final = "llama.cpp"
# Mode → whether it hears the partials too.
PEER_MODES: Final = {PEER: False, f"{PEER}+partials": True}
_ROOT: Final = Path(__file__).parent.parent.parent


class PeerError(Exception):
    """The peer cannot be measured; the message is the reason for its row."""


class PeerProcess:
    """A running ``benchmarks.voice.llama_worker``. Raises ``PeerError`` if it does not load."""

    def __init__(self, path: Path, threads: int, context: int) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.voice.llama_worker", str(path), str(threads), str(context)],
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
        try:
            self.version: str = self._reply()["version"]
        except BaseException:
            self.close()
            raise

    def hear(self, utterance: dict[str, Any]) -> dict[str, Any]:
        """One utterance (``llama_worker.hear``). Raises ``PeerError``."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(utterance).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None
        return self._reply()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._log.close()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._failure()
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _failure(self) -> PeerError:
        self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return PeerError(f"failed: {lines[-1] if lines else f'exit status {self._process.returncode}'}")


def run_peer(
    mode: str,
    bundle: Bundle,
    cache_dir: Path,
    prompts: Prompts,
    threads: int,
    trace: Sequence[Utterance],
    speed: float,
) -> ModeRun:
    """The trace through a fresh process, which has evaluated the system prompt before, as a warm-up."""
    run = ModeRun(mode)
    entrant = next(entrant for entrant in lineup("smollm2-135m") if entrant.engine == PEER)
    if (missing := entrant.missing) is not None:
        run.status = missing
        return run
    try:
        path = entrant.prepare(cache_dir)
        process = PeerProcess(path, threads, bundle.manifest.model.max_seq_len)
    except Exception as error:  # a peer's converter may raise anything, and the others go on
        run.status = str(error) if isinstance(error, PeerError) else f"failed: {error or repr(error)}"
        return run
    try:
        for _ in range(WARM_UPS):
            prompt_ids = prompts.query(WARM_UP_TEXT)
            process.hear({"partials": [], "at_s": 0.0, "prompt_ids": prompt_ids, "max_tokens": MAX_TOKENS})
        others = OthersShare()
        for utterance in progress(mode, trace):
            reply = process.hear(to_request(utterance, prompts, speed, with_partials=PEER_MODES[mode]))
            run.samples.append(_to_sample(reply, utterance, prompts))
        run.others_cpu = others.share()
    except PeerError as error:
        run.status = str(error)
    finally:
        process.close()
    return run


def to_request(utterance: Utterance, prompts: Prompts, speed: float, *, with_partials: bool) -> dict[str, Any]:
    """An utterance as the worker takes it."""
    partials = utterance.partials if with_partials else ()
    words_s = utterance.duration_s if with_partials else UNHEARD_S
    return {
        "partials": [(partial.at_s / speed, prompts.partial(partial.text)) for partial in partials],
        "at_s": words_s / speed,
        "prompt_ids": prompts.query(utterance.text),
        "max_tokens": MAX_TOKENS,
    }


def _to_sample(reply: dict[str, Any], utterance: Utterance, prompts: Prompts) -> Sample:
    return Sample(
        first_ms=reply["first_ms"],
        asked_before=utterance.asked_before,
        source=None,
        cached_from=None,
        cached_tokens=reply["reused_tokens"],
        prompt_tokens=len(prompts.query(utterance.text)),
        completion_tokens=reply["completion_tokens"],
        decode_ms=reply["decode_ms"],
    )
