"""``python -m export distill``: its options, and what it prints."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Final

from edge_llm.arguments import non_negative, positive_int
from export.distill.losses import LossWeights
from export.distill.recipe import DistilOptions, distil
from export.distill.student import StudentShape
from export.distill.text_recipe import TextOptions, distil_text
from export.distill.train import TrainSettings
from export.errors import ExportError
from export.packs.extra import add_extra
from export.packs.pack import load_pack

if TYPE_CHECKING:
    from edge_llm.arguments import OneLineParser
    from edge_llm.bundle.manifest import Manifest

_DEFAULT_VOCABULARY: Final = 8192
_DEFAULT_TEACHER: Final = "smollm2-135m-instruct"


def add_distill_parser(commands: argparse._SubParsersAction[OneLineParser]) -> None:
    """Add the command to ``python -m export``."""
    parser = commands.add_parser("distill", help="train a small GPT-2 for a pack or from a text, and write its bundle")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--pack", type=Path, metavar="FOLDER", help="a domain pack")
    task.add_argument("--text", type=Path, metavar="FILE", help="a UTF-8 text to distil the teacher on, with no pack")
    parser.add_argument(
        "--teacher",
        default=_DEFAULT_TEACHER,
        metavar="MODEL",
        help=f"as for bundle: lends tokenizer and embeddings, and teaches (default {_DEFAULT_TEACHER})",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="BUNDLE", help="the folder to write")
    parser.add_argument(
        "--work", type=Path, required=True, metavar="FOLDER", help="checkpoints; the same command goes on from there"
    )
    parser.add_argument(
        "--student",
        type=_shape,
        default=StudentShape(6, 384),
        metavar="LAYERSxWIDTH",
        help="shape of the student (default 6x384)",
    )
    parser.add_argument(
        "--start-from",
        type=Path,
        metavar="FOLDER",
        help="with --pack: go on with the weights of an earlier student (student-hf in its --work), such as after "
        "utterances were added to the pack",
    )
    parser.add_argument(
        "--vocabulary", type=positive_int, metavar="N", help="tokens (default: 8192 for a pack, all of them for a text)"
    )
    parser.add_argument("--context", type=positive_int, default=256, metavar="N", help="positions (default 256)")
    parser.add_argument(
        "--examples", type=positive_int, default=300_000, metavar="N", help="drawn from the pack (default 300000)"
    )
    parser.add_argument("--steps", type=positive_int, default=9_000, metavar="N", help="of the student (default 9000)")
    parser.add_argument(
        "--teacher-steps",
        type=int,
        default=0,
        metavar="N",
        help="fine-tune the teacher on the pack for N steps, and let the student learn from it (default 0: do not)",
    )
    parser.add_argument(
        "--rephrase",
        type=int,
        default=0,
        metavar="N",
        help="ask the fine-tuned teacher for N more utterances, and keep those that it understands (default 0)",
    )
    parser.add_argument(
        "--echo-every",
        type=int,
        default=0,
        metavar="N",
        help="an exercise in copying after every N of the student's examples (default 0: none)",
    )
    parser.add_argument(
        "--cut-share",
        type=float,
        default=0.7,
        metavar="R",
        help="share of examples that end a few tokens into their text, which leaves time for more (default 0.7)",
    )
    parser.add_argument(
        "--hidden-weight",
        type=non_negative,
        default=0.0,
        metavar="R",
        help="with --text: how much the cosine distance of the last hidden states counts, for a student as wide as its "
        "teacher (default 0; DistilGPT2 has 1)",
    )
    parser.add_argument(
        "--compare-seeds",
        type=int,
        default=0,
        metavar="N",
        help="with --text: train N students with the teacher and N without it, and write what it is worth into "
        "quality.json (default 0: do not)",
    )
    parser.add_argument("--batch-tokens", type=positive_int, default=2048, metavar="N", help="a step (default 2048)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, metavar="R", help="of the student (default 0.001)")
    parser.add_argument(
        "--matrix-learning-rate",
        type=non_negative,
        default=2.5e-3,
        metavar="R",
        help="of the student's layers, by Muon (default 0.0025; 0 trains them with AdamW as the rest)",
    )
    parser.add_argument(
        "--extra", type=Path, metavar="FILE", help="more utterances, as `edge-llm feedback export` writes them"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--name", help="of the bundle (default: the pack's, with -gpt2)")
    parser.add_argument("--bundle-version", default="1", metavar="VERSION", help="of the bundle (default 1)")


def run_distill(arguments: argparse.Namespace) -> Manifest:
    """Train and export. Raises ``ExportError`` for anything wrong with the input."""
    if arguments.text is not None:
        return distil_text(_text_options(arguments))
    if arguments.hidden_weight or arguments.compare_seeds:
        raise ExportError("--hidden-weight and --compare-seeds go with --text")
    pack = load_pack(arguments.pack)
    if arguments.extra is not None:
        pack = add_extra(pack, arguments.extra)
    return distil(pack, _options(arguments))


def _options(arguments: argparse.Namespace) -> DistilOptions:
    learns = arguments.teacher_steps > 0
    if arguments.rephrase and not learns:
        raise ExportError("--rephrase needs a fine-tuned teacher: give --teacher-steps too")
    loss = LossWeights(cross_entropy=0.5, divergence=0.5) if learns else LossWeights()
    settings = TrainSettings(
        steps=arguments.steps,
        batch_tokens=arguments.batch_tokens,
        learning_rate=arguments.learning_rate,
        matrix_learning_rate=arguments.matrix_learning_rate,
        seed=arguments.seed,
        loss=loss,
    )
    teacher_settings = TrainSettings(
        steps=arguments.teacher_steps,
        batch_tokens=arguments.batch_tokens,
        # A pretrained model forgets at a student's rate.
        learning_rate=2e-4,
        seed=arguments.seed,
    )
    return DistilOptions(
        teacher=arguments.teacher,
        out=arguments.out,
        work=arguments.work,
        settings=settings,
        student=arguments.student,
        vocabulary=arguments.vocabulary or _DEFAULT_VOCABULARY,
        context=arguments.context,
        examples=arguments.examples,
        start_from=arguments.start_from,
        teacher_settings=teacher_settings if learns else None,
        rephrased=arguments.rephrase,
        echo_every=arguments.echo_every,
        cut_share=arguments.cut_share,
        seed=arguments.seed,
        name=arguments.name,
        version=arguments.bundle_version,
    )


def _text_options(arguments: argparse.Namespace) -> TextOptions:
    given = (
        arguments.teacher_steps,
        arguments.rephrase,
        arguments.echo_every,
        arguments.extra,
        arguments.start_from,
    )
    if any(given):
        raise ExportError("--teacher-steps, --rephrase, --echo-every, --extra and --start-from go with --pack")
    return TextOptions(
        teacher=arguments.teacher,
        text=arguments.text,
        out=arguments.out,
        work=arguments.work,
        settings=TrainSettings(
            steps=arguments.steps,
            batch_tokens=arguments.batch_tokens,
            learning_rate=arguments.learning_rate,
            matrix_learning_rate=arguments.matrix_learning_rate,
            seed=arguments.seed,
            # Every token of a text counts alike.
            loss=LossWeights(cross_entropy=0.5, divergence=0.5),
        ),
        student=arguments.student,
        vocabulary=arguments.vocabulary,
        context=arguments.context,
        hidden_weight=arguments.hidden_weight,
        compare_seeds=arguments.compare_seeds,
        seed=arguments.seed,
        name=arguments.name,
        version=arguments.bundle_version,
    )


def _shape(text: str) -> StudentShape:
    try:
        return StudentShape.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
