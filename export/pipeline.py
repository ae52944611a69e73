"""From MODEL to a bundle: load, build, verify, compute the shared prefix, package."""

from __future__ import annotations

import os
import re
import shutil
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np
import onnx
import onnxruntime
import tokenizers

from edge_llm import __version__
from edge_llm.bundle.manifest import QUALITY_FILE, TOKENIZER_FILE, GenerationDefaults, Manifest, sha256_file
from edge_llm.engine.prompt import Message, PromptRenderer
from edge_llm.engine.tokenizer import Tokenizer
from export.calibrate import CALIBRATION_TEXT, measure_magnitudes
from export.checkpoints import load_checkpoint
from export.errors import ExportError
from export.graph.weights import CPU_FP32
from export.graphs import build_graph, describe_graph, estimated_bytes
from export.package import check_destination, check_space, list_files, publish, staging
from export.shipped_prefix import add_prefix_files
from export.smoothing import SmoothedTensors
from export.template import make_prompt_template
from export.verify import check_limit, compare, expect_greedy, open_runner, read_text_tokens

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from edge_llm.bundle.manifest import Expectation, GraphQuality, ModelDims, PromptTemplate
    from export.checkpoint import Checkpoint
    from export.graph.weights import WeightFormat

MAX_CONTEXT: Final = 2048
_MIN_CONTEXT: Final = 16
_SELF_TEST_QUESTION: Final = "What is artificial intelligence?"
_SPARE_BYTES: Final = 16 << 20


@dataclass(frozen=True)
class ExportOptions:
    """What the user asked for.

    Attributes:
        out: the bundle folder to write.
        targets: the graphs, the one to serve first.
        context: positions of the KV cache; None is the model's own, at most ``MAX_CONTEXT``.
        verify_text: the text that quantised graphs are judged on.
        max_perplexity_ratio: a quantised graph above it fails the export.
        verify_hf: whether to compare with transformers as well.
        ship_prefix: whether the bundle brings the KV of the head that all its prompts share.
        name: of the bundle; None is the checkpoint's.
        version: of the bundle.
        generation: defaults that take the place of the checkpoint's, as fields of ``GenerationDefaults``.
    """

    out: Path
    targets: tuple[WeightFormat, ...]
    verify_text: Path
    max_perplexity_ratio: float
    context: int | None = None
    verify_hf: bool = False
    ship_prefix: bool = False
    name: str | None = None
    version: str = "1"
    generation: Mapping[str, float] = field(default_factory=dict)


def export_bundle(model: str, options: ExportOptions) -> Manifest:
    """Load MODEL and write its bundle; see ``load_checkpoint`` and ``export_checkpoint``."""
    # Before anything slow: a download of gigabytes should not end in "not empty".
    check_destination(options.out)
    return export_checkpoint(load_checkpoint(model), options)


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
    text_tokens = read_text_tokens(options.verify_text, checkpoint.tokenizer_json)
    if any(token_id >= dims.vocab_size for token_id in prompt.stop_token_ids):
        raise ExportError(
            f"a stop token of {list(prompt.stop_token_ids)} is outside the vocabulary of {dims.vocab_size}"
        )
    with staging(options.out.absolute()) as folder:
        graphs = _build(checkpoint, options.targets, dims, folder)
        quality, report = _verify(checkpoint, options, dims, graphs, text_tokens)
        expectation = _self_test(graphs[options.targets[0]], dims, checkpoint, prompt)
        if CPU_FP32 not in options.targets:
            shutil.rmtree(_graph_folder(folder, CPU_FP32))
        (folder / TOKENIZER_FILE).write_text(checkpoint.tokenizer_json, encoding="utf-8")
        (folder / QUALITY_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
        manifest = _manifest(checkpoint, options, dims, prompt, quality, expectation, folder)
        if options.ship_prefix:
            manifest = add_prefix_files(folder, manifest)
        publish(folder, options.out.absolute(), manifest)
    return manifest


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
    checkpoint: Checkpoint, targets: Sequence[WeightFormat], dims: ModelDims, folder: Path
) -> dict[WeightFormat, Path]:
    """Every target's graph, and always the float32 one, by which the others are calibrated and judged."""
    built = list(dict.fromkeys([CPU_FP32, *targets]))
    needed = sum(estimated_bytes(checkpoint, weights, dims) for weights in built)
    check_space(folder, needed + _SPARE_BYTES)
    reference = build_graph(checkpoint, CPU_FP32, dims, _graph_folder(folder, CPU_FP32))
    graphs = {CPU_FP32: reference}
    if len(built) > 1:
        groups = checkpoint.architecture.smoothing_groups()
        text_tokens = read_text_tokens(CALIBRATION_TEXT, checkpoint.tokenizer_json)
        magnitudes = measure_magnitudes(reference, dims, [group.activation for group in groups], text_tokens)
        smoothed = replace(checkpoint, tensors=SmoothedTensors(checkpoint.tensors, groups, magnitudes))
        for weights in built[1:]:
            graphs[weights] = build_graph(smoothed, weights, dims, _graph_folder(folder, weights))
    return graphs


def _graph_folder(folder: Path, weights: WeightFormat) -> Path:
    return folder / "graphs" / weights.target


def _verify(
    checkpoint: Checkpoint,
    options: ExportOptions,
    dims: ModelDims,
    graphs: dict[WeightFormat, Path],
    text_tokens: Sequence[int],
) -> tuple[tuple[GraphQuality, ...], dict[str, Any]]:
    """Judge every quantised graph; returns the manifest's summaries and the contents of quality.json."""
    reference = open_runner(graphs[CPU_FP32], dims)
    report: dict[str, Any] = {
        "reference": f"cpu-fp32 graph, {checkpoint.reference}",
        "text": {
            "file": options.verify_text.name,
            "sha256": sha256_file(options.verify_text),
            "tokens": len(text_tokens),
        },
        "max_perplexity_ratio": options.max_perplexity_ratio,
        "graphs": [],
    }
    qualities = []
    for weights in options.targets:
        if not weights.is_quantized:
            continue
        figures = compare(open_runner(graphs[weights], dims), reference, text_tokens, f"verifying {weights.target}")
        check_limit(figures, weights.target, options.max_perplexity_ratio)
        quality = figures.quality(weights.target, options.max_perplexity_ratio)
        qualities.append(quality)
        details = {
            "bits": weights.bits,
            "block_size": weights.block_size,
            "predictions": figures.tokens,
            "perplexity": round(figures.perplexity, 4),
            "reference_perplexity": round(figures.reference_perplexity, 4),
            "max_logit_difference": round(figures.max_logit_difference, 4),
        }
        report["graphs"].append(msgspec.to_builtins(quality) | details)
    if options.verify_hf:
        from export.verify_hf import compare_with_transformers

        report["transformers"] = compare_with_transformers(checkpoint, reference, text_tokens)
    return tuple(qualities), report


def _self_test(graph_path: Path, dims: ModelDims, checkpoint: Checkpoint, prompt: PromptTemplate) -> Expectation:
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(checkpoint.tokenizer_json))
    prompt_ids = PromptRenderer(prompt, tokenizer).encode([Message("user", _SELF_TEST_QUESTION)])
    return expect_greedy(open_runner(graph_path, dims), prompt_ids)


def _manifest(
    checkpoint: Checkpoint,
    options: ExportOptions,
    dims: ModelDims,
    prompt: PromptTemplate,
    quality: tuple[GraphQuality, ...],
    expectation: Expectation,
    folder: Path,
) -> Manifest:
    graphs = tuple(describe_graph(weights) for weights in options.targets)
    paths = [TOKENIZER_FILE, QUALITY_FILE]
    for graph in graphs:
        paths += [path for path in (graph.file, graph.data_file) if path is not None]
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
    )
