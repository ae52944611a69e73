"""A campaign against one subject: child processes that are watched, and started again after a crash or a hang."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from benchmarks.fuzz.child import make_case, open_subject

if TYPE_CHECKING:
    from typing import IO

_ROOT: Final = Path(__file__).parent.parent.parent
_START_TIMEOUT_S: Final = 120.0
# A subject that fails so often has told enough.
MAX_FINDINGS: Final = 20


class FuzzError(Exception):
    """The campaign itself cannot be run."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What to try.

    Attributes:
        name: of the target.
        entry: ``module:function`` that makes its subject.
        seed: of all inputs.
        seconds: for how long.
        max_inputs: how many at most.
        hang_s: an input that takes longer is a hang.
        folder: where inputs that fail are written.
    """

    name: str
    entry: str
    seed: int
    seconds: float
    folder: str
    max_inputs: int = 1 << 31
    hang_s: float = 20.0


class Finding(msgspec.Struct, frozen=True):
    """An input that did what none may do. ``file`` holds it."""

    kind: Literal["fault", "hang", "crash"]
    index: int
    what: str
    file: str


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a campaign. ``outcomes`` counts those inputs that were taken or refused."""

    target: str
    seed: int
    inputs: int
    seconds: float
    outcomes: dict[str, int]
    findings: tuple[Finding, ...]

    def count(self, kind: str) -> int:
        """Findings of one kind."""
        return sum(finding.kind == kind for finding in self.findings)


class _Campaign:
    """The state of one campaign."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.tried = 0
        self.outcomes: Counter[str] = Counter()
        self.findings: list[Finding] = []

    def note(self, line: str) -> None:
        """One line of the child."""
        kind, _, what = line.partition(" ")
        if kind == "ok":
            self.outcomes[what] += 1
            self.tried += 1
        else:
            self.fail("fault", what)

    def fail(self, kind: Literal["fault", "hang", "crash"], what: str) -> None:
        """The input that was being tried is a finding."""
        file = Path(self.plan.folder) / self.plan.name / f"{kind}-{self.plan.seed}-{self.tried}"
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            subject = open_subject(self.plan.entry, Path(scratch))
            file.write_bytes(make_case(subject, self.plan.seed, self.tried))
        self.findings.append(Finding(kind, self.tried, what, str(file)))
        self.tried += 1


def run_campaign(plan: Plan) -> Report:
    """Try inputs until the time is over, they are as many as wanted, or enough has failed.

    Raises:
        FuzzError: the subject cannot even be made.
    """
    campaign = _Campaign(plan)
    started_at = time.monotonic()
    ends_at = started_at + plan.seconds
    while campaign.tried < plan.max_inputs and len(campaign.findings) < MAX_FINDINGS:
        left_s = ends_at - time.monotonic()
        if left_s <= 0:
            break
        _follow(campaign, left_s)
    return Report(
        target=plan.name,
        seed=plan.seed,
        inputs=campaign.tried,
        seconds=round(time.monotonic() - started_at, 1),
        outcomes=dict(campaign.outcomes.most_common()),
        findings=tuple(campaign.findings),
    )


def replay(plan: Plan, case: Path) -> str:
    """Try one input from a file; what came of it. Raises ``FuzzError`` if the subject cannot be made."""
    with tempfile.TemporaryFile() as log:
        child = _start(plan, 0, 1, plan.seconds, log, case)
        assert child.stdout is not None
        try:
            # The first line says that it is ready; a hang begins after that.
            if not select.select([child.stdout], [], [], _START_TIMEOUT_S)[0] or not child.stdout.readline():
                raise FuzzError(f"{plan.name}: {_last_line(log)}")
            output, _ = child.communicate(timeout=plan.hang_s)
        except subprocess.TimeoutExpired:
            return "hang"
        finally:
            _end(child)
        lines = output.decode(errors="replace").splitlines()
        return lines[0] if lines else f"crash: {_ended_by(child.returncode, log)}"


def _follow(campaign: _Campaign, seconds: float) -> None:
    """Start a child where the last one ended, and read what it says until it ends or has to be ended."""
    plan = campaign.plan
    with tempfile.TemporaryFile() as log:
        child = _start(plan, campaign.tried, plan.max_inputs - campaign.tried, seconds, log)
        assert child.stdout is not None
        descriptor, rest, ready = child.stdout.fileno(), b"", False
        try:
            while len(campaign.findings) < MAX_FINDINGS:
                if not select.select([descriptor], [], [], plan.hang_s if ready else _START_TIMEOUT_S)[0]:
                    if not ready:
                        raise FuzzError(f"{plan.name}: not ready within {_START_TIMEOUT_S:.0f} s")
                    campaign.fail("hang", f"no end within {plan.hang_s:.0f} s")
                    return
                block = os.read(descriptor, 1 << 16)
                if not block:
                    break
                *lines, rest = (rest + block).split(b"\n")
                for line in lines:
                    if ready:
                        campaign.note(line.decode())
                    ready = True
            else:
                return
            if not ready:
                raise FuzzError(f"{plan.name}: {_last_line(log)}")
            if child.wait() != 0:
                campaign.fail("crash", _ended_by(child.returncode, log))
        finally:
            _end(child)


def _start(
    plan: Plan, first: int, count: int, seconds: float, log: IO[bytes], case: Path | None = None
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-X", "faulthandler", "-m", "benchmarks.fuzz.child", plan.entry, str(plan.seed)]
    command += [str(first), str(count), str(seconds), *([] if case is None else [str(case.resolve())])]
    # The child imports the subject from this checkout; one thread is enough for it.
    environ = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    # Unbuffered: whoever reads the first line leaves the others in the pipe.
    return subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=log, env=environ, bufsize=0)


def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()
    assert child.stdout is not None
    child.stdout.close()


def _ended_by(returncode: int, log: IO[bytes]) -> str:
    if returncode >= 0:
        return f"exit status {returncode}: {_last_line(log)}"
    return f"{signal.Signals(-returncode).name}: {_last_line(log)}"


def _last_line(log: IO[bytes]) -> str:
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"
