"""From MODEL to a bundle: load, build, verify, compute the shared prefix, package."""

from __future__ import annotations

import itertools
import math
import os
import re
import shutil
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec
import numpy as np
import onnx
import onnxruntime
import tokenizers

from edge_llm import __version__
from edge_llm.bundle.manifest import QUALITY_FILE, TOKENIZER_FILE, GenerationDefaults, Manifest, sha256_file
from edge_llm.domain.schema import DOMAIN_FILE, encode_domain
from edge_llm.engine.prompt import Message, PromptRenderer
from edge_llm.engine.tokenizer import Tokenizer
from export.calibrate import CALIBRATION_TEXT, measure_magnitudes
from export.checkpoints import load_checkpoint
from export.console import say
from export.errors import ExportError
from export.graph.check_qdq import unquantized
from export.graph.weights import CPU_FP32
from export.graphs import build_graph, describe_graph, estimated_bytes
from export.package import check_destination, check_space, list_files, publish, staging
from export.quantize_qdq import quantize_products
from export.shipped_prefix import add_prefix_files
from export.smoothing import SmoothedTensors
from export.template import make_prompt_template
from export.verify import (
    DEFAULT_MAX_CUDA_PERPLEXITY_RATIO,
    DEFAULT_MAX_TENSORRT_INT8_PERPLEXITY_RATIO,
    DEFAULT_MAX_TENSORRT_PERPLEXITY_RATIO,
    check_limit,
    compare,
    expect_greedy,
    open_judged,
    open_runner,
    read_text_tokens,
    text_windows,
)
from export.verify_expectation import settle_expectations
from export.verify_float16 import check_activations, compare_greedy
from export.verify_static import UNTESTED_NOTE, static_paths
from export.vocabulary import trim_checkpoint, trim_vocabulary

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from edge_llm.bundle.manifest import Expectation, GraphQuality, ModelDims, PromptTemplate
    from edge_llm.domain.schema import DomainSchema
    from export.checkpoint import Checkpoint
    from export.graph.weights import WeightFormat

MAX_CONTEXT: Final = 2048
_MIN_CONTEXT: Final = 16
_SELF_TEST_QUESTION: Final = "What is artificial intelligence?"
_SPARE_BYTES: Final = 16 << 20
_CALIBRATION_WINDOW_TOKENS: Final = 128
CARD_FILE: Final = "README.md"


@dataclass(frozen=True)
class DomainParts:
    """What a domain bundle holds beside the model, and what it is judged on instead of a text.

    Attributes:
        schema: for ``domain.json``.
        calibrate: token ids of examples, for quantisation.
        verify: token ids of examples that the model was not trained on.
        report: more of quality.json.
        card: the model card, README.md of the bundle.
    """

    schema: DomainSchema
    calibrate: Sequence[Sequence[int]]
    verify: Sequence[Sequence[int]]
    report: Mapping[str, Any]
    card: str


@dataclass(frozen=True)
class ExportOptions:
    """What the user asked for.

    Attributes:
        out: the bundle folder to write.
        targets: the graphs, the one to serve first.
        context: positions of the KV cache; None is the model's own, at most ``MAX_CONTEXT``.
        verify_text: the text that quantised graphs are judged on.
        max_perplexity_ratio: a quantised graph above it fails the export.
        max_cuda_perplexity_ratio: the same for the ``cuda`` graph.
        max_tensorrt_perplexity_ratio: the same for ``tensorrt`` and ``tensorrt-primitive``.
        max_tensorrt_int8_perplexity_ratio: the same for ``tensorrt-int8``.
        verify_hf: whether to compare with transformers as well.
        ship_prefix: whether the bundle brings the KV of the head that all its prompts share.
        name: of the bundle; None is the checkpoint's.
        version: of the bundle.
        generation: defaults that take the place of the checkpoint's, as fields of ``GenerationDefaults``.
        vocabulary: the most tokens to keep, and the UTF-8 text whose tokens come first; None keeps all.
        domain: of a model that was distilled for a domain.
        report: more of quality.json.
    """

    out: Path
    targets: tuple[WeightFormat, ...]
    verify_text: Path
    max_perplexity_ratio: float
    max_cuda_perplexity_ratio: float = DEFAULT_MAX_CUDA_PERPLEXITY_RATIO
    max_tensorrt_perplexity_ratio: float = DEFAULT_MAX_TENSORRT_PERPLEXITY_RATIO
    max_tensorrt_int8_perplexity_ratio: float = DEFAULT_MAX_TENSORRT_INT8_PERPLEXITY_RATIO
    context: int | None = None
    verify_hf: bool = False
    ship_prefix: bool = False
    name: str | None = None
    version: str = "1"
    generation: Mapping[str, float] = field(default_factory=dict)
    vocabulary: tuple[int, Path] | None = None
    domain: DomainParts | None = None
    report: Mapping[str, Any] = field(default_factory=dict)

    def perplexity_limit(self, weights: WeightFormat) -> float:
        """The limit of one target."""
        if weights.is_qdq:
            return self.max_tensorrt_int8_perplexity_ratio
        if weights.is_static:
            return self.max_tensorrt_perplexity_ratio
        return self.max_cuda_perplexity_ratio if weights.target == "cuda" else self.max_perplexity_ratio


def export_bundle(model: str, options: ExportOptions) -> Manifest:
    """Load MODEL and write its bundle; see ``load_checkpoint`` and ``export_checkpoint``."""
    # Before anything slow: a download of gigabytes should not end in "not empty".
    check_destination(options.out)
    checkpoint = load_checkpoint(model)
    if options.vocabulary is not None:
        checkpoint = _trimmed(checkpoint, *options.vocabulary)
    return export_checkpoint(checkpoint, options)


def export_checkpoint(checkpoint: Checkpoint, options: ExportOptions) -> Manifest:
    """Write a loaded checkpoint's bundle.

    Returns:
        The manifest that was written.

    Raises:
        ExportError: anything about the input, the disk or the quality; nothing is left behind.
    """
    check_destination(options.out)
    checkpoint = replace(checkpoint, generation=_generation(checkpoint.generation, options.generation))
    dims = checkpoint.architecture.dims(_context(checkpoint, options.context))
    prompt = make_prompt_template(checkpoint)
    texts = _texts(checkpoint, options, dims)
    if any(token_id >= dims.vocab_size for token_id in prompt.stop_token_ids):
        raise ExportError(
            f"a stop token of {list(prompt.stop_token_ids)} is outside the vocabulary of {dims.vocab_size}"
        )
    with staging(options.out.absolute()) as folder:
        graphs = _build(checkpoint, options, dims, texts.calibrate, folder)
        quality, report = _verify(checkpoint, options, dims, graphs, texts)
        served = options.targets[0]
        expectation = _self_test(graphs[served], served, dims, checkpoint, prompt)
        if CPU_FP32 not in options.targets:
            shutil.rmtree(_graph_folder(folder, CPU_FP32))
        (folder / TOKENIZER_FILE).write_text(checkpoint.tokenizer_json, encoding="utf-8")
        report |= options.report
        if options.domain is not None:
            report |= options.domain.report
            (folder / DOMAIN_FILE).write_bytes(encode_domain(options.domain.schema))
            (folder / CARD_FILE).write_text(options.domain.card, encoding="utf-8")
        (folder / QUALITY_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
        manifest = _manifest(checkpoint, options, dims, prompt, quality, expectation, folder)
        differences = {entry["target"]: entry["max_logit_difference"] for entry in report["graphs"]}
        manifest = settle_expectations(folder, manifest, differences)
        if options.ship_prefix:
            manifest = add_prefix_files(folder, manifest)
        publish(folder, options.out.absolute(), manifest)
    return manifest


def _trimmed(checkpoint: Checkpoint, max_size: int, text_path: Path) -> Checkpoint:
    """The checkpoint over a smaller vocabulary, saying what that gains."""
    try:
        text = text_path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"cannot read the text for --vocabulary, {text_path}: {error}") from None
    trimmed = trim_vocabulary(checkpoint.tokenizer_json, text.splitlines(keepends=True), max_size)
    smaller = trim_checkpoint(checkpoint, trimmed)
    before, after = (sum(map(math.prod, one.tensors.shapes.values())) for one in (checkpoint, smaller))
    own, kept = (Tokenizer(tokenizers.Tokenizer.from_str(one.tokenizer_json)) for one in (checkpoint, smaller))
    say(
        f"vocabulary: {checkpoint.architecture.vocab_size} tokens become {trimmed.size}, {before / 1e6:.1f} million "
        f"weights {after / 1e6:.1f}; a token costs about {1 - after / before:.0%} less to generate, and the text is "
        f"spelled in {len(kept.encode(text)) / max(1, len(own.encode(text))) - 1:.1%} more tokens"
    )
    return smaller


class _Texts(NamedTuple):
    """Token ids of what quantisation is fitted to and judged on, and how to describe the latter."""

    calibrate: Sequence[Sequence[int]]
    verify: Sequence[Sequence[int]]
    description: dict[str, Any]


def _texts(checkpoint: Checkpoint, options: ExportOptions, dims: ModelDims) -> _Texts:
    if options.domain is not None:
        verify = options.domain.verify
        described: dict[str, Any] = {"held_out_examples": len(verify), "tokens": sum(map(len, verify))}
        return _Texts(options.domain.calibrate, verify, described)
    token_ids = read_text_tokens(options.verify_text, checkpoint.tokenizer_json)
    described = {
        "file": options.verify_text.name,
        "sha256": sha256_file(options.verify_text),
        "tokens": len(token_ids),
    }
    calibration = read_text_tokens(CALIBRATION_TEXT, checkpoint.tokenizer_json)
    calibrate = text_windows(calibration, min(_CALIBRATION_WINDOW_TOKENS, dims.max_seq_len))
    return _Texts(calibrate, text_windows(token_ids, dims.max_seq_len), described)


def _generation(own: GenerationDefaults, asked: Mapping[str, float]) -> GenerationDefaults:
    try:
        return msgspec.convert(msgspec.to_builtins(own) | dict(asked), GenerationDefaults)
    except msgspec.ValidationError as error:
        raise ExportError(f"generation defaults: {error}") from None


def _context(checkpoint: Checkpoint, asked: int | None) -> int:
    longest = checkpoint.architecture.context_length
    if asked is None:
        return min(longest, MAX_CONTEXT)
    if not _MIN_CONTEXT <= asked <= longest:
        raise ExportError(f"--context {asked} is out of range: this model takes {_MIN_CONTEXT} to {longest} positions")
    return asked


def _build(
    checkpoint: Checkpoint,
    options: ExportOptions,
    dims: ModelDims,
    calibrate: Sequence[Sequence[int]],
    folder: Path,
) -> dict[WeightFormat, Path]:
    """Every target's graph, and always the float32 one, by which the others are calibrated and judged."""
    built = list(dict.fromkeys([CPU_FP32, *options.targets]))
    needed = sum(estimated_bytes(checkpoint, weights, dims) for weights in built)
    check_space(folder, needed + _SPARE_BYTES)
    reference = build_graph(checkpoint, CPU_FP32, dims, _graph_folder(folder, CPU_FP32))
    graphs = {CPU_FP32: reference}
    smoothed = checkpoint
    if any(weights.bits < 16 for weights in built):
        groups = checkpoint.architecture.smoothing_groups()
        magnitudes = measure_magnitudes(reference, dims, [group.activation for group in groups], calibrate)
        smoothed = replace(checkpoint, tensors=SmoothedTensors(checkpoint.tensors, groups, magnitudes))
    for weights in built[1:]:
        source = smoothed if weights.bits < 16 else checkpoint
        graphs[weights] = build_graph(source, weights, dims, _graph_folder(folder, weights))
        if weights.is_qdq:
            judge = open_runner(reference, dims, CPU_FP32)
            quantize_products(graphs[weights], dims, weights, calibrate, judge, options.perplexity_limit(weights))
    return graphs


def _graph_folder(folder: Path, weights: WeightFormat) -> Path:
    return folder / "graphs" / weights.target


def _verify(
    checkpoint: Checkpoint,
    options: ExportOptions,
    dims: ModelDims,
    graphs: dict[WeightFormat, Path],
    texts: _Texts,
) -> tuple[tuple[GraphQuality, ...], dict[str, Any]]:
    """Judge every graph but the reference itself; returns the manifest's summaries and the contents of quality.json."""
    reference = open_runner(graphs[CPU_FP32], dims, CPU_FP32)
    report: dict[str, Any] = {
        "reference": f"cpu-fp32 graph, {checkpoint.reference}",
        "text": texts.description,
        "max_perplexity_ratio": options.max_perplexity_ratio,
        "graphs": [],
    }
    qualities = []
    for weights in options.targets:
        if weights == CPU_FP32:
            continue
        limit = options.perplexity_limit(weights)
        runner = open_judged(graphs[weights], dims, weights)
        figures = compare(runner, reference, texts.verify, f"verifying {weights.target}")
        check_limit(figures, weights.target, limit)
        quality = figures.quality(weights.target, limit)
        qualities.append(quality)
        details: dict[str, Any] = {
            "bits": weights.bits,
            "block_size": weights.block_size,
            "predictions": figures.tokens,
            "perplexity": round(figures.perplexity, 4),
            "reference_perplexity": round(figures.reference_perplexity, 4),
            "max_logit_difference": round(figures.max_logit_difference, 4),
        }
        if weights.float_type == "float16":
            measured = static_paths(graphs[weights]).prefill if weights.is_static else graphs[weights]
            details |= check_activations(measured, dims, weights.target, texts.verify)
            details["greedy"] = _greedy_beside(weights, graphs, dims, texts.verify)
        if weights.is_qdq:
            model = onnx.load(str(graphs[weights]), load_external_data=False)
            details["unquantized"] = unquantized(model)
        if weights.is_static:
            details["hardware"] = UNTESTED_NOTE
        report["graphs"].append(msgspec.to_builtins(quality) | details)
    if options.verify_hf:
        from export.verify_hf import compare_with_transformers

        report["transformers"] = compare_with_transformers(
            checkpoint, reference, list(itertools.chain.from_iterable(texts.verify))
        )
    return tuple(qualities), report


def _greedy_beside(
    weights: WeightFormat,
    graphs: Mapping[WeightFormat, Path],
    dims: ModelDims,
    windows: Sequence[Sequence[int]],
) -> dict[str, Any]:
    """Greedy tokens beside those of the graph with the same integers, or the float32 one if the bundle has none."""
    same = [
        other for other in graphs if other.target == "cpu-int8" and other.bits == weights.bits and not weights.is_qdq
    ]
    other = same[0] if same else CPU_FP32
    own, reference = (open_runner(graphs[one], dims, one) for one in (weights, other))
    agreement = compare_greedy(own, reference, weights.target, windows, strict=not weights.is_qdq)
    return {"compared_with": other.target} | agreement._asdict()


def _self_test(
    graph_path: Path, weights: WeightFormat, dims: ModelDims, checkpoint: Checkpoint, prompt: PromptTemplate
) -> Expectation:
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(checkpoint.tokenizer_json))
    prompt_ids = PromptRenderer(prompt, tokenizer).encode([Message("user", _SELF_TEST_QUESTION)])
    return expect_greedy(open_runner(graph_path, dims, weights), prompt_ids)


def _manifest(
    checkpoint: Checkpoint,
    options: ExportOptions,
    dims: ModelDims,
    prompt: PromptTemplate,
    quality: tuple[GraphQuality, ...],
    expectation: Expectation,
    folder: Path,
) -> Manifest:
    graphs = tuple(describe_graph(weights, dims) for weights in options.targets)
    paths = [TOKENIZER_FILE, QUALITY_FILE, *([] if options.domain is None else [DOMAIN_FILE, CARD_FILE])]
    for graph in graphs:
        paths += graph.files
    # Builds that must not depend on the clock say when they happen (reproducible-builds.org).
    created = float(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
    return Manifest(
        format=1,
        name=re.sub(r"[^A-Za-z0-9._-]+", "-", options.name or checkpoint.name),
        version=options.version,
        source=checkpoint.source,
        license=checkpoint.license,
        reference=checkpoint.reference,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(created)),
        exporter={
            "edge_llm": __version__,
            "numpy": np.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
            "tokenizers": tokenizers.__version__,
        },
        model=dims,
        graphs=graphs,
        prompt=prompt,
        generation=checkpoint.generation,
        quality=quality,
        expectation=expectation,
        files=list_files(folder, paths),
        domain_file=None if options.domain is None else DOMAIN_FILE,
    )
