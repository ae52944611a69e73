"""Fuzzing: ``python -m benchmarks.fuzz [--seconds N] [--target NAME] [--json]``.

Each target runs in a child process of its own, with limits on memory and on the time of one input. A finding is a
fault (an exception that is none of ours, or a broken promise), a hang or a crash; its input is written to ``--out``,
and ``--replay FILE`` tries it again. The same seed gives the same inputs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from benchmarks.fuzz.campaign import FuzzError, Plan, Report, replay, run_campaign
from benchmarks.machine import describe_machine, format_machine

if TYPE_CHECKING:
    from collections.abc import Sequence

PACKAGES: Final = ("onnxruntime", "tokenizers", "msgspec", "cryptography", "paho-mqtt", "numpy")
DEFAULT_OUT: Final = Path(".cache/fuzz")
TARGETS: Final[dict[str, str]] = {
    "payloads": "benchmarks.fuzz.messages:payloads",
    "topics": "benchmarks.fuzz.messages:topics",
    "manifest": "benchmarks.fuzz.bundle_files:Manifests",
    "signature": "benchmarks.fuzz.bundle_files:Signatures",
    "domain": "benchmarks.fuzz.bundle_files:Domains",
    "tokenizer": "benchmarks.fuzz.bundle_files:Tokenizers",
    "graph": "benchmarks.fuzz.bundle_files:Graphs",
    "archive": "benchmarks.fuzz.archives:Archives",
    "config": "benchmarks.fuzz.settings:Configs",
    "device": "benchmarks.fuzz.settings:Devices",
    "prefix": "benchmarks.fuzz.kept_files:Prefixes",
    "state": "benchmarks.fuzz.kept_files:States",
    "cache": "benchmarks.fuzz.kept_files:Copies",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; exit status 1 if there is a finding, 2 if a campaign could not be run."""
    options = _parser().parse_args(arguments)
    try:
        if options.replay is not None:
            print(replay(_plan(options, options.target[0]), options.replay))
            return 0
        reports = [_run(options, name) for name in options.target or TARGETS]
    except FuzzError as error:
        print(f"benchmarks.fuzz: {error}", file=sys.stderr)
        return 2
    machine = describe_machine(1, PACKAGES)
    if options.json:
        print(json.dumps({"machine": machine, "targets": msgspec.to_builtins(reports)}))
    else:
        print(f"{format_machine(machine)}\n\n{format_reports(reports)}")
    return 1 if any(report.findings for report in reports) else 0


def format_reports(reports: Sequence[Report]) -> str:
    """A table, what came of the inputs of each target, and the findings."""
    lines = [f"{'target':<10}{'inputs':>9}{'seconds':>9}{'outcomes':>10}{'faults':>8}{'hangs':>7}{'crashes':>9}"]
    for report in reports:
        counts = [report.count(kind) for kind in ("fault", "hang", "crash")]
        lines.append(
            f"{report.target:<10}{report.inputs:>9}{report.seconds:>9.1f}{len(report.outcomes):>10}"
            f"{counts[0]:>8}{counts[1]:>7}{counts[2]:>9}"
        )
    lines.append(f"{'together':<10}{sum(report.inputs for report in reports):>9}")
    for report in reports:
        lines += ["", f"{report.target}, seed {report.seed}:"]
        lines += [f"  {count:>8}  {what}" for what, count in report.outcomes.items()]
        lines += [f"  {finding.kind}: {finding.what}\n            {finding.file}" for finding in report.findings]
    return "\n".join(lines)


def _run(options: argparse.Namespace, name: str) -> Report:
    if sys.stderr.isatty():
        print(f"{name} …", file=sys.stderr)
    return run_campaign(_plan(options, name))


def _plan(options: argparse.Namespace, name: str) -> Plan:
    settings: dict[str, Any] = {} if options.inputs is None else {"max_inputs": options.inputs}
    return Plan(
        name=name,
        entry=TARGETS[name],
        seed=options.seed,
        seconds=options.seconds,
        folder=str(options.out),
        hang_s=options.hang_s,
        **settings,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__)
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this one; may be repeated")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each target (default %(default)s)")
    parser.add_argument("--inputs", type=int, help="at most so many for each target")
    parser.add_argument("--seed", type=int, default=0, help="of all inputs (default %(default)s)")
    parser.add_argument("--hang-s", type=float, default=20.0, help="what takes longer hangs (default %(default)s)")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="for inputs that fail (default %(default)s)")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="try this input with the one --target")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser
