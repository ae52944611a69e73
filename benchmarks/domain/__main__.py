"""How a domain bundle understands people it has never heard: ``python -m benchmarks.domain [--json]``.

Every utterance goes through the daemon's own engine and grammar, int8, without any cache, and once more without the
grammar. FILE holds JSON lines ``{"text", "kind": "command" | "fact" | "outside", "actions": [{"name", "slots"}],
"answer_keywords": […]}``; without one, the held-out lines of the pack are used, or with ``--blind`` its blind ones.
``--mqtt`` measures latency as well.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from benchmarks.domain.judging import Judged, at_thresholds, figures_of, judge_all, share
from benchmarks.domain.latency import measure_latency
from benchmarks.domain.utterances import pack_utterances, read_utterances
from benchmarks.files.cache import default_cache_dir
from benchmarks.machine import describe_machine, format_machine
from benchmarks.serving import ServingError
from edge_llm.bundle.manifest import Bundle
from edge_llm.config import Config, EngineConfig
from edge_llm.device.cpu import physical_cores
from edge_llm.domain.domain import Domain
from edge_llm.engine.loading import load_model
from edge_llm.errors import EdgeLlmError
from export.graph.weights import CPU_FP32
from export.pipeline import ExportOptions, export_bundle
from export.verify import DEFAULT_MAX_PERPLEXITY_RATIO, DEFAULT_TEXT

if TYPE_CHECKING:
    from collections.abc import Sequence

PACKAGES: Final = ("onnxruntime", "tokenizers", "numpy")
DEFAULT_BUNDLE: Final = Path("bundles/vehicle-gpt2-int8")
DEFAULT_PACK: Final = Path("examples/vehicle")
# What the host of a car would publish, so that answers about its state have something to say.
_STATE: Final = {"range_km": b"312", "charge_percent": b"64", "tyre_status": b"all fine"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; exit status 2 if it could not be measured."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.blind and options.utterances:
        parser.error("--blind takes the lines of --pack: leave out --utterances")
    try:
        report = measure(options)
    except (EdgeLlmError, ServingError) as error:
        print(f"benchmarks.domain: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report) if options.json else format_report(report, options.failures))
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Judge every utterance with and without the grammar.

    Raises:
        EdgeLlmError: the bundle cannot be used, or FILE is malformed.
    """
    bundle = Bundle.open(options.bundle)
    if options.utterances:
        utterances = read_utterances(options.utterances)
    else:
        utterances = pack_utterances(options.pack, blind=options.blind)
    config = Config(cache_dir=str(options.cache_dir))
    model = load_model(bundle, config)
    if model.domain is None:
        raise EdgeLlmError(f"{options.bundle} is no domain bundle: it has no domain_file")
    for name, payload in _STATE.items():
        model.domain.values.update(name, payload)
    judged = judge_all(model, model.domain, utterances, "with the grammar")
    figures = figures_of(judged)
    free = Domain(model.domain.schema, model.tokenizer, constrained=False)
    free.values = model.domain.values
    model.engine.make_sampler = free.sampler
    without = figures_of(judge_all(model, free, utterances, "without the grammar"))
    report = {
        "machine": describe_machine(physical_cores(), PACKAGES),
        "bundle": f"{bundle.manifest.name} {bundle.manifest.version}",
        "utterances": str(options.utterances or options.pack) + (" (blind)" if options.blind else ""),
        **msgspec.to_builtins(figures),
        **({"failures": []} if options.blind else {}),
        "thresholds": at_thresholds(judged),
        "without_grammar": {
            name: value for name, value in msgspec.to_builtins(without).items() if name not in ("n", "failures")
        },
    }
    if options.float32 is not None:
        report["float32"] = compare_with_float32(options.float32, model.domain, judged)
    if options.mqtt:
        report["mqtt"] = measure_latency(bundle, options.cache_dir, [utterance.text for utterance in utterances])
    return report


def compare_with_float32(student: Path, domain: Domain, judged: Sequence[Judged]) -> dict[str, Any]:
    """Answer every utterance once more with float32 weights, and count where both do the same.

    Args:
        student: the Hugging Face folder that the bundle was exported from.
        domain: the bundle's.
        judged: what the bundle has done.
    """
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "float32"
        options = ExportOptions(
            out=out, targets=(CPU_FP32,), verify_text=DEFAULT_TEXT, max_perplexity_ratio=DEFAULT_MAX_PERPLEXITY_RATIO
        )
        export_bundle(str(student), options)
        model = load_model(Bundle.open(out), Config(engine=EngineConfig(target="cpu-fp32", prepare=False)))
        model.engine.make_sampler = domain.sampler
        exact = judge_all(model, domain, [one.wanted for one in judged], "float32")
    same = [
        mine.kind == other.kind and mine.actions == other.actions for mine, other in zip(judged, exact, strict=True)
    ]
    return {"same_kind_and_actions": share(same), "action_exact": figures_of(exact).action_exact}


def format_report(report: dict[str, Any], failures: int) -> str:
    """The table, and the first failures."""
    lines = [format_machine(report["machine"]), "", f"{report['bundle']} on {report['utterances']}: {report['n']}", ""]
    rows = {
        "actions exact": "action_exact",
        "kind and answer right": "answer_right",
        "outside refused": "outside_refused",
        "outside executed": "outside_executed",
        "  at most (95 %)": "outside_executed_upper_95",
        "fact or chat executed": "reply_executed",
    }
    lines.append(f"{'':24}{'grammar':>10}{'without':>10}")
    for label, key in rows.items():
        values = (report[key], report["without_grammar"][key])
        lines.append(f"{label:24}" + "".join(f"{'-' if v is None else format(v, '.2%'):>10}" for v in values))
    lines.append(
        f"{'actions dropped':24}{report['dropped_actions']:>10}{report['without_grammar']['dropped_actions']:>10}"
    )
    if "float32" in report:
        lines.append(f"{'same as float32':24}{report['float32']['same_kind_and_actions']:>10.2%}")
    lines += ["", "min_confidence   commands exact   wrong action   outside executed   fact or chat executed"]
    for row in report["thresholds"]:
        shares = [row[key] for key in ("action_exact", "wrong_action", "outside_executed", "reply_executed")]
        cells = [format(value, ".2%") if value is not None else "-" for value in shares]
        widths = (17, 15, 19, 24)
        lines.append(
            f"{row['min_confidence']:>14.1f}" + "".join(f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True))
        )
    if "mqtt" in report:
        mqtt = report["mqtt"]
        lines += [
            "",
            f"over MQTT, cold, {mqtt['queries']} queries (ms)     p50     p95     p99",
            *(
                f"  {label:32}" + "".join(f"{mqtt[f'{key}_ms_p{p}']:>8.1f}" for p in (50, 95, 99))
                for label, key in (("first text", "first_text"), ("whole answer", "whole_answer"))
            ),
        ]
    for failure in report["failures"][:failures]:
        lines.append(f"\n{failure['kind']}: {failure['text']}\n  wanted {failure['wanted']}\n  got    {failure['got']}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.domain", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument(
        "--utterances", type=Path, metavar="FILE", help="JSON lines (default: the pack's held-out lines)"
    )
    parser.add_argument(
        "--blind",
        action="store_true",
        help="judge by the pack's blind lines, and say only how many failed: whoever sees which would write for them",
    )
    parser.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE, help=f"default {DEFAULT_BUNDLE}")
    parser.add_argument("--pack", type=Path, default=DEFAULT_PACK, help=f"default {DEFAULT_PACK}")
    parser.add_argument(
        "--float32", type=Path, metavar="FOLDER", help="the student's Hugging Face folder: compare with its own weights"
    )
    parser.add_argument("--mqtt", action="store_true", help="measure latency over MQTT too")
    parser.add_argument("--failures", type=int, default=20, help="how many to print (default 20)")
    parser.add_argument("--cache-dir", type=Path, default=default_cache_dir(), help="where prepared copies are kept")
    return parser


if __name__ == "__main__":
    sys.exit(main())
