"""The command line: ``python -m export bundle MODEL --out BUNDLE``, ``distill``, ``pack``, ``kit``, ``sign`` …"""

from __future__ import annotations

import argparse
import math
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from edge_llm.arguments import OneLineParser, non_negative, positive_int
from edge_llm.errors import EdgeLlmError
from export.alias import ALIASES
from export.distill.command import add_distill_parser, run_distill
from export.errors import ExportError
from export.graph.weights import (
    CPU_FP32,
    DEFAULT_BLOCK_SIZE,
    cpu_int8,
    cuda,
    tensorrt,
    tensorrt_int8,
    tensorrt_primitive,
)
from export.kit import add_kit_parser, run_kit
from export.packs.command import add_pack_parser, run_pack
from export.pipeline import ExportOptions, export_bundle
from export.quantize import BLOCK_SIZES
from export.signing import add_signing_parsers, run_keygen, run_sign
from export.verify import (
    DEFAULT_MAX_CUDA_PERPLEXITY_RATIO,
    DEFAULT_MAX_PERPLEXITY_RATIO,
    DEFAULT_MAX_TENSORRT_INT8_PERPLEXITY_RATIO,
    DEFAULT_MAX_TENSORRT_PERPLEXITY_RATIO,
    DEFAULT_TEXT,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edge_llm.bundle.manifest import Manifest
    from export.graph.weights import WeightFormat

_TARGETS: Final = ("cpu-int8", "cpu-fp32", "cuda", "tensorrt", "tensorrt-int8", "tensorrt-primitive")
_SIGNING: Final = {"keygen": run_keygen, "sign": run_sign}
_GENERATION: Final = ("max_tokens", "temperature", "repetition_penalty")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 2 for anything wrong with the input, 130 when interrupted."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        if options.command == "pack":
            run_pack(options)
            return 0
        if options.command == "kit":
            print(f"written: {run_kit(options)}")
            return 0
        if options.command in _SIGNING:
            print(f"written: {_SIGNING[options.command](options)}")
            return 0
        if options.command == "distill":
            manifest = run_distill(options)
        else:
            manifest = export_bundle(options.model, _export_options(options))
    except EdgeLlmError as error:
        print(f"export: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = "the work folder keeps what was done" if options.command == "distill" else "nothing was written"
        print(f"export: interrupted, {kept}", file=sys.stderr)
        return 130
    _print_summary(manifest, options.out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="python -m export", description="Turn a checkpoint into an edge-llm bundle.")
    commands = parser.add_subparsers(dest="command", required=True)
    bundle = commands.add_parser("bundle", help="write a bundle that edge-llm serves")
    bundle.add_argument(
        "model", help=f"a Hugging Face folder or hub id, a .gguf file, or an alias ({', '.join(ALIASES)})"
    )
    bundle.add_argument("--out", type=Path, required=True, metavar="BUNDLE", help="the folder to write")
    bundle.add_argument(
        "--target",
        action="extend",
        type=_targets,
        metavar="TARGET",
        help=f"graphs to build, repeated or with commas: {', '.join(_TARGETS)} (default cpu-int8); the first is served",
    )
    bundle.add_argument(
        "--context", type=int, metavar="N", help="positions of the KV cache (default: the model's, at most 2048)"
    )
    bundle.add_argument("--bits", type=int, choices=(8, 4), default=8, help="of cpu-int8's linear layers (default 8)")
    bundle.add_argument(
        "--block",
        type=int,
        choices=sorted(BLOCK_SIZES),
        help=f"weights that share a scale, where the matrix allows it (default {DEFAULT_BLOCK_SIZE}, 32 with --bits 4)",
    )
    bundle.add_argument(
        "--verify-text", type=Path, default=DEFAULT_TEXT, metavar="FILE", help="UTF-8 text to judge the quality on"
    )
    bundle.add_argument(
        "--max-perplexity-ratio",
        type=_ratio,
        default=DEFAULT_MAX_PERPLEXITY_RATIO,
        metavar="R",
        help=f"fail above this, against float32 (default {DEFAULT_MAX_PERPLEXITY_RATIO})",
    )
    bundle.add_argument(
        "--max-cuda-perplexity-ratio",
        type=_ratio,
        default=DEFAULT_MAX_CUDA_PERPLEXITY_RATIO,
        metavar="R",
        help=f"the same for the cuda graph (default {DEFAULT_MAX_CUDA_PERPLEXITY_RATIO})",
    )
    bundle.add_argument(
        "--max-tensorrt-perplexity-ratio",
        type=_ratio,
        default=DEFAULT_MAX_TENSORRT_PERPLEXITY_RATIO,
        metavar="R",
        help=f"the same for the tensorrt graphs (default {DEFAULT_MAX_TENSORRT_PERPLEXITY_RATIO})",
    )
    bundle.add_argument(
        "--max-tensorrt-int8-perplexity-ratio",
        type=_ratio,
        default=DEFAULT_MAX_TENSORRT_INT8_PERPLEXITY_RATIO,
        metavar="R",
        help=f"the same for tensorrt-int8, which keeps products in float16 that would lose too much (default "
        f"{DEFAULT_MAX_TENSORRT_INT8_PERPLEXITY_RATIO})",
    )
    bundle.add_argument("--verify", choices=("hf",), help="hf: compare with transformers too (needs torch)")
    bundle.add_argument(
        "--ship-prefix",
        action="store_true",
        help="ship the keys and values of what every prompt begins with, so that the device never computes them",
    )
    bundle.add_argument(
        "--vocabulary", type=positive_int, metavar="N", help="keep at most N tokens (needs --vocabulary-text)"
    )
    bundle.add_argument(
        "--vocabulary-text", type=Path, metavar="FILE", help="UTF-8 text of the kind that is asked and answered"
    )
    bundle.add_argument("--name", help="of the bundle (default: the model's)")
    bundle.add_argument("--bundle-version", default="1", metavar="VERSION", help="of the bundle (default 1)")
    defaults = bundle.add_argument_group("defaults", "for queries that set nothing (default: the model's own)")
    defaults.add_argument("--max-tokens", type=positive_int)
    defaults.add_argument("--temperature", type=non_negative, help="0 is greedy")
    defaults.add_argument("--repetition-penalty", type=non_negative, help="1 is none")
    add_distill_parser(commands)
    add_pack_parser(commands)
    add_kit_parser(commands)
    add_signing_parsers(commands)
    return parser


def _targets(value: str) -> list[str]:
    names = value.split(",")
    for name in names:
        if name not in _TARGETS:
            raise argparse.ArgumentTypeError(f"no target {name!r}, only {', '.join(_TARGETS)}")
    return names


def _ratio(value: str) -> float:
    ratio = float(value)
    if not (math.isfinite(ratio) and ratio > 0):
        raise argparse.ArgumentTypeError("give a positive number such as 1.01")
    return ratio


def _export_options(options: argparse.Namespace) -> ExportOptions:
    block_size = options.block or (DEFAULT_BLOCK_SIZE if options.bits == 8 else 32)
    formats: dict[str, WeightFormat] = {
        "cpu-int8": cpu_int8(options.bits, block_size),
        "cpu-fp32": CPU_FP32,
        "cuda": cuda(options.block or DEFAULT_BLOCK_SIZE),
        "tensorrt": tensorrt(),
        "tensorrt-int8": tensorrt_int8(),
        "tensorrt-primitive": tensorrt_primitive(),
    }
    names = dict.fromkeys(options.target or ["cpu-int8"])
    return ExportOptions(
        out=options.out,
        targets=tuple(formats[name] for name in names),
        verify_text=options.verify_text,
        max_perplexity_ratio=options.max_perplexity_ratio,
        max_cuda_perplexity_ratio=options.max_cuda_perplexity_ratio,
        max_tensorrt_perplexity_ratio=options.max_tensorrt_perplexity_ratio,
        max_tensorrt_int8_perplexity_ratio=options.max_tensorrt_int8_perplexity_ratio,
        context=options.context,
        verify_hf=options.verify == "hf",
        ship_prefix=options.ship_prefix,
        vocabulary=_vocabulary(options),
        name=options.name,
        version=options.bundle_version,
        generation={name: value for name in _GENERATION if (value := getattr(options, name)) is not None},
    )


def _vocabulary(options: argparse.Namespace) -> tuple[int, Path] | None:
    if (options.vocabulary is None) != (options.vocabulary_text is None):
        raise ExportError("give --vocabulary N and --vocabulary-text FILE together")
    return None if options.vocabulary is None else (options.vocabulary, options.vocabulary_text)


def _interrupt(*_: object) -> NoReturn:
    # The same way out as Ctrl-C, so that the staged folder is removed.
    raise KeyboardInterrupt


def _print_summary(manifest: Manifest, out: Path) -> None:
    size_mb = sum(entry.size_bytes for entry in manifest.files) / 1e6
    model = manifest.model
    print(f"\n{manifest.name} {manifest.version} → {out} ({size_mb:.0f} MB)")
    print(
        f"  model    {model.architecture}, {model.num_layers} layers, vocabulary {model.vocab_size}, "
        f"context {model.max_seq_len}"
    )
    print(f"  licence  {manifest.license}")
    for quality in manifest.quality:
        print(f"  {quality.target} against float32 ({manifest.reference}):")
        print(
            f"           perplexity ratio {quality.perplexity_ratio:.4f} (limit {quality.max_perplexity_ratio:g}), "
            f"top-1 agreement {quality.top1_agreement:.1%}, mean KL {quality.mean_kl:.4f}"
        )
    print(f"\nServe it:  edge-llm serve --bundle {out}")
