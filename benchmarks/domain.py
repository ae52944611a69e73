"""How a domain bundle understands people it has never heard: ``python -m benchmarks.domain [--json]``.

Every utterance goes through the daemon's own engine and grammar, int8, without any cache, and once more without the
grammar. FILE holds JSON lines ``{"text", "kind": "command" | "fact" | "outside", "actions": [{"name", "slots"}],
"answer_keywords": […]}``; without one, the held-out lines of the pack are used. ``--mqtt`` measures latency as well.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from benchmarks.files.cache import default_cache_dir
from benchmarks.machine import describe_machine, format_machine
from benchmarks.ratios import percentile
from benchmarks.serving import BenchClient, Daemon, ServingError
from edge_llm.bundle.manifest import Bundle
from edge_llm.bundle.prepare import prepared_graph
from edge_llm.config import Config, EngineConfig
from edge_llm.device.cpu import physical_cores
from edge_llm.domain.domain import Domain
from edge_llm.engine.loading import LoadedModel, load_model
from edge_llm.engine.prompt import Message
from edge_llm.engine.sampler import SamplingParams
from edge_llm.errors import EdgeLlmError
from edge_llm.local_broker import local_broker
from export.console import progress
from export.graph.weights import CPU_FP32
from export.packs.examples import Example, held_out_examples
from export.packs.pack import load_pack
from export.pipeline import ExportOptions, export_bundle
from export.verify import DEFAULT_MAX_PERPLEXITY_RATIO, DEFAULT_TEXT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edge_llm.domain.answer import DomainAnswer

PACKAGES: Final = ("onnxruntime", "tokenizers", "numpy")
DEFAULT_BUNDLE: Final = Path("bundles/vehicle-gpt2-int8")
DEFAULT_PACK: Final = Path("examples/vehicle")
_MAX_TOKENS: Final = 160
_LATENCY_QUERIES: Final = 200
_COLD: Final = ("cache.prefix=false", "cache.responses=false", "prefetch.popularity=false")
# What the host of a car would publish, so that answers about its state have something to say.
_STATE: Final = {"range_km": b"312", "charge_percent": b"64", "tyre_status": b"all fine"}


class WantedAction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An action that should come out."""

    name: str
    slots: dict[str, int | float | str] = {}


class Utterance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of FILE. ``kind`` chat is small talk, which the pack has too."""

    text: str
    kind: Literal["command", "fact", "outside", "chat"]
    actions: tuple[WantedAction, ...] = ()
    answer_keywords: tuple[str, ...] = ()


class Judged(msgspec.Struct, frozen=True):
    """An utterance and what came out."""

    wanted: Utterance
    kind: str
    actions: tuple[WantedAction, ...]
    text: str
    dropped_actions: int

    @property
    def actions_exact(self) -> bool:
        """Names and all slots, in order; text slots compare without case."""
        return [_comparable(action) for action in self.actions] == [_comparable(a) for a in self.wanted.actions]

    @property
    def kind_right(self) -> bool:
        """A command whose number is out of range is refused, with the range."""
        expected = "refusal" if self.wanted.kind == "outside" else self.wanted.kind
        return self.kind == expected or (expected == "command" and not self.wanted.actions and self.kind == "refusal")

    @property
    def answer_right(self) -> bool:
        """Kind, and every keyword somewhere in the answer."""
        said = self.text.casefold()
        return self.kind_right and all(keyword.casefold() in said for keyword in self.wanted.answer_keywords)


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Shares of the utterances that each concerns; None where there are none."""

    n: int
    action_exact: float | None
    answer_right: float | None
    outside_refused: float | None
    outside_executed: float | None
    outside_executed_upper_95: float | None
    dropped_actions: int
    failures: list[dict[str, Any]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; exit status 2 if it could not be measured."""
    options = _parser().parse_args(arguments)
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
    utterances = read_utterances(options.utterances) if options.utterances else pack_utterances(options.pack)
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
        "utterances": str(options.utterances or options.pack),
        **msgspec.to_builtins(figures),
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
    return {"same_kind_and_actions": _share(same), "action_exact": figures_of(exact).action_exact}


def read_utterances(path: Path) -> list[Utterance]:
    """Read FILE. Raises ``EdgeLlmError`` naming the line that is wrong."""
    utterances = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                utterances.append(msgspec.json.decode(line, type=Utterance))
            except msgspec.MsgspecError as error:
                raise EdgeLlmError(f"{path}:{number}: {error}") from None
    return utterances


def pack_utterances(folder: Path) -> list[Utterance]:
    """The held-out lines of a pack; the whole answer is their keyword, where it holds no placeholder."""
    return [_as_utterance(example) for example in held_out_examples(load_pack(folder))]


def judge_all(model: LoadedModel, domain: Domain, utterances: Sequence[Utterance], description: str) -> list[Judged]:
    """Answer every utterance."""
    judged = []
    with progress(description, len(utterances), unit="utterance") as bar:
        for utterance in utterances:
            judged.append(judge(model, domain, utterance))
            bar.update()
    return judged


def figures_of(judged: Sequence[Judged]) -> Figures:
    """Count."""
    commands = [one for one in judged if one.wanted.kind == "command"]
    outside = [one for one in judged if one.wanted.kind == "outside"]
    answered = [one for one in judged if one.wanted.kind != "outside"]
    executed = sum(bool(one.actions) for one in outside)
    return Figures(
        n=len(judged),
        action_exact=_share([one.actions_exact for one in commands]),
        answer_right=_share([one.answer_right for one in answered]),
        outside_refused=_share([one.kind_right and not one.actions for one in outside]),
        outside_executed=_share([bool(one.actions) for one in outside]),
        outside_executed_upper_95=binomial_upper(executed, len(outside)) if outside else None,
        dropped_actions=sum(one.dropped_actions for one in judged),
        failures=[_failure(one) for one in judged if not (one.actions_exact and one.answer_right)],
    )


def judge(model: LoadedModel, domain: Domain, utterance: Utterance) -> Judged:
    """Answer one utterance from an empty cache, as the scheduler would."""
    engine = model.engine
    prompt_ids = model.renderer.encode([Message("user", utterance.text)])
    state = engine.start(prompt_ids, SamplingParams(), _MAX_TOKENS)
    answer: DomainAnswer = domain.answer(lambda: state.sampler, ())
    try:
        while not state.prefilled:
            engine.prefill(state)
        while not state.finished:
            engine.decode([state])
    finally:
        engine.release(state)
    answer.push(state.output_ids)
    answer.finish()
    actions = tuple(WantedAction(call.name, call.slots) for call in answer.actions)
    return Judged(utterance, answer.kind, actions, answer.text, answer.dropped_actions)


def measure_latency(bundle: Bundle, cache_dir: Path, texts: Sequence[str]) -> dict[str, Any]:
    """First text and whole answer as a client sees them, every cache off."""
    prepared_graph(bundle, bundle.manifest.graphs[0].target, cache_dir)
    first_ms, whole_ms = [], []
    step = max(1, len(texts) // _LATENCY_QUERIES)
    with tempfile.TemporaryDirectory() as name, local_broker(Path(name)) as broker:
        client = BenchClient(broker.port)
        daemon = Daemon(bundle, cache_dir, broker.port, Path(name) / "daemon.log", _COLD)
        try:
            client.wait_online(daemon, daemon.start())
            for number, text in enumerate(texts[::step]):
                (answer,) = client.ask(daemon, [{"id": f"q{number}", "text": text, "cache": "bypass"}])
                assert answer.final is not None
                first = answer.deltas[0] if answer.deltas else answer.final
                first_ms.append((first.at - answer.published_at) * 1e3)
                whole_ms.append((answer.final.at - answer.published_at) * 1e3)
        finally:
            daemon.stop()
            client.close()
    return {
        "queries": len(first_ms),
        **{f"first_text_ms_p{p}": round(percentile(first_ms, p), 2) for p in (50, 95, 99)},
        **{f"whole_answer_ms_p{p}": round(percentile(whole_ms, p), 2) for p in (50, 95, 99)},
    }


def binomial_upper(successes: int, trials: int, confidence: float = 0.95) -> float:
    """One-sided upper bound of a share (Clopper and Pearson 1934): the share that makes so few unlikely."""
    low, high = successes / trials, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        at_most = sum(math.comb(trials, k) * middle**k * (1 - middle) ** (trials - k) for k in range(successes + 1))
        low, high = (middle, high) if at_most > 1 - confidence else (low, middle)
    return high


def format_report(report: dict[str, Any], failures: int) -> str:
    """The table, and the first failures."""
    lines = [format_machine(report["machine"]), "", f"{report['bundle']} on {report['utterances']}: {report['n']}", ""]
    rows = {
        "actions exact": "action_exact",
        "kind and answer right": "answer_right",
        "outside refused": "outside_refused",
        "outside executed": "outside_executed",
        "  at most (95 %)": "outside_executed_upper_95",
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


def _as_utterance(example: Example) -> Utterance:
    kind = "outside" if example.kind == "refusal" else example.kind
    actions = tuple(WantedAction(call.action, dict(call.slots)) for call in example.calls)
    keywords = tuple(answer for answer in example.answers if "{" not in answer)
    return Utterance(example.text, kind, actions, keywords)


def _comparable(action: WantedAction) -> tuple[str, dict[str, Any]]:
    return action.name, {
        name: value.casefold().strip() if isinstance(value, str) else float(value)
        for name, value in action.slots.items()
    }


def _failure(judged: Judged) -> dict[str, Any]:
    return {
        "text": judged.wanted.text,
        "kind": judged.wanted.kind,
        "wanted": [msgspec.to_builtins(action) for action in judged.wanted.actions] or judged.wanted.answer_keywords,
        "got": [judged.kind, [msgspec.to_builtins(action) for action in judged.actions], judged.text],
    }


def _share(hits: Sequence[bool]) -> float | None:
    return round(sum(hits) / len(hits), 5) if hits else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.domain", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument(
        "--utterances", type=Path, metavar="FILE", help="JSON lines (default: the pack's held-out lines)"
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
