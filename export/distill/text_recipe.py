"""A student from a teacher and a plain text, with no pack: DistilGPT2's way, on whatever text the user brings::

    WORK/teacher-<key>/     the teacher's predictions for the text
    WORK/student/           the student's training
    WORK/compare/           the same student trained without the teacher, and other seeds, if that was asked for
    WORK/student-hf/        the student as a Hugging Face folder

The student takes over the teacher's tokenizer (trimmed, if asked), prompt template and stop tokens. A GPT-2 of the
teacher's width starts from its alternating layers (Sanh et al. 2019), any other from its embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import tokenizers

from edge_llm.engine.tokenizer import Tokenizer
from export.architectures.gpt2 import Gpt2Config
from export.checkpoints import load_checkpoint
from export.console import say
from export.distill.compare import compare_with_and_without
from export.distill.corpus import text_corpus
from export.distill.evaluate import bits_per_byte
from export.distill.losses import HiddenStates
from export.distill.student import StudentShape, alternate_layers, new_student, save_student, take_embeddings
from export.distill.teacher import CacheKey, TeacherCache
from export.distill.train import Trainer, TrainSettings
from export.errors import ExportError
from export.graph.weights import cpu_int8
from export.hf_checkpoint import load_folder
from export.package import check_destination
from export.pipeline import ExportOptions, export_checkpoint
from export.torch_model import model_from_tensors
from export.verify import DEFAULT_MAX_PERPLEXITY_RATIO, DEFAULT_TEXT
from export.vocabulary import trim_checkpoint, trim_vocabulary

if TYPE_CHECKING:
    from pathlib import Path

    from edge_llm.bundle.manifest import Manifest
    from export.checkpoint import Checkpoint
    from export.distill.corpus import Corpus

_HELD_OUT_SHARE: Final = 0.05
_MIN_HELD_OUT_CHARACTERS: Final = 200


@dataclass(frozen=True)
class TextOptions:
    """What the user asked for.

    Attributes:
        teacher: as for ``load_checkpoint``.
        text: a UTF-8 text; its end is held out.
        out: the bundle folder to write.
        work: the folder for everything in between.
        settings: of the student's training.
        student: layers and width.
        vocabulary: the most tokens to keep; None keeps all.
        context: positions of the student.
        hidden_weight: how much the cosine distance of hidden states counts; 0 leaves it out.
        compare_seeds: how many seeds to train with and without the teacher, to measure what it is worth; 0 is none.
        top_k: predictions of the teacher that are kept of each position.
        seed: of weights and order.
        name: of the bundle; None is the teacher's with the student's shape.
        version: of the bundle.
    """

    teacher: str
    text: Path
    out: Path
    work: Path
    settings: TrainSettings
    student: StudentShape = field(default_factory=lambda: StudentShape(6, 384))
    vocabulary: int | None = None
    context: int = 256
    hidden_weight: float = 0.0
    compare_seeds: int = 0
    top_k: int = 16
    seed: int = 0
    name: str | None = None
    version: str = "1"


@dataclass(frozen=True)
class _Task:
    """Everything that a training needs."""

    checkpoint: Checkpoint
    teacher: Any
    tokenizer: Tokenizer
    corpus: Corpus
    held_out: str


def distil_text(options: TextOptions) -> Manifest:
    """Train a student on a text and write its bundle.

    Raises:
        ExportError: anything about the input, the disk or the quality; the work folder keeps what was done.
    """
    check_destination(options.out)
    task = _task(options)
    key = CacheKey(task.checkpoint.source, task.corpus.digest, options.top_k, options.settings.loss.temperature)
    targets = TeacherCache(options.work, key, int(task.corpus.token_ids.size))
    targets.fill(task.teacher, task.corpus)
    student = _train(options, task, options.work / "student", targets, options.seed)
    report: dict[str, Any] = {
        "held_out_bits_per_byte": {
            "bytes": len(task.held_out.encode()),
            "teacher": round(_bits(task.teacher, task, options), 4),
            "student": round(_bits(student, task, options), 4),
        }
    }
    say(f"held-out bits per byte: {report['held_out_bits_per_byte']}")
    if options.compare_seeds:

        def train(seed: int, folder: Path, *, distilled: bool) -> float:
            trained = _train(options, task, folder, targets if distilled else None, seed)
            return _bits(trained, task, options)

        folder = options.work / "compare"
        report["distilling"] = compare_with_and_without(train, folder, range(options.compare_seeds))
    return _write_bundle(options, task, student, report)


def _task(options: TextOptions) -> _Task:
    checkpoint = load_checkpoint(options.teacher)
    longest = checkpoint.architecture.context_length
    if options.context > longest:
        raise ExportError(f"--context {options.context} is too long: the teacher takes at most {longest} positions")
    try:
        text = options.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"cannot read --text {options.text}: {error}") from None
    trained, held_out = split_text(text)
    if options.vocabulary is not None:
        trimmed = trim_vocabulary(checkpoint.tokenizer_json, text.splitlines(keepends=True), options.vocabulary)
        checkpoint = trim_checkpoint(checkpoint, trimmed)
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(checkpoint.tokenizer_json))
    corpus = text_corpus(trained, tokenizer, checkpoint.eos_token_ids[0], options.context)
    options.work.mkdir(parents=True, exist_ok=True)
    return _Task(checkpoint, model_from_tensors(checkpoint), tokenizer, corpus, held_out)


def split_text(text: str) -> tuple[str, str]:
    """What is trained on, and the end of the text, which is not; cut at a line.

    Raises:
        ExportError: the text is too short to hold anything out.
    """
    cut = text.rfind("\n", 0, int(len(text) * (1 - _HELD_OUT_SHARE))) + 1
    if cut == 0 or len(text) - cut < _MIN_HELD_OUT_CHARACTERS:
        raise ExportError(
            f"--text is too short: {_HELD_OUT_SHARE:.0%} of it, at least {_MIN_HELD_OUT_CHARACTERS} characters, is "
            "held out"
        )
    return text[:cut], text[cut:]


def _train(options: TextOptions, task: _Task, folder: Path, targets: TeacherCache | None, seed: int) -> Any:
    """A student, trained; without ``targets`` on the text alone."""
    vocab_size = task.checkpoint.architecture.vocab_size
    student = new_student(options.student, vocab_size, options.context, dropout=0.0, seed=seed)
    origin = _initialise(student, task)
    settings = replace(options.settings, seed=seed)
    hidden_states = None
    if targets is None:
        settings = replace(settings, loss=replace(settings.loss, cross_entropy=1.0, divergence=0.0))
    elif options.hidden_weight:
        width = task.teacher.config.hidden_size
        if width != options.student.hidden_size:
            raise ExportError(
                f"--hidden-weight compares hidden states, so the student must be as wide as the teacher: {width}"
            )
        hidden_states = HiddenStates(task.teacher, options.hidden_weight)
    trainer = Trainer(student, task.corpus, settings, folder, targets, origin, hidden_states)
    trainer.run()
    return trainer.averaged()


def _initialise(student: Any, task: _Task) -> str:
    """Take over what can be; says what it was."""
    config = student.config
    architecture = task.checkpoint.architecture
    if (
        isinstance(architecture, Gpt2Config)
        and (architecture.hidden_size, architecture.num_heads) == (config.n_embd, config.n_head)
        and architecture.num_layers >= config.n_layer
    ):
        alternate_layers(student, task.teacher)
        return f"alternating layers of {task.checkpoint.source}"
    table = task.teacher.get_input_embeddings().weight.detach().numpy()
    take_embeddings(student, table)
    return f"embeddings of {task.checkpoint.source}"


def _bits(model: Any, task: _Task, options: TextOptions) -> float:
    ids = [task.checkpoint.eos_token_ids[0], *task.tokenizer.encode(task.held_out)]
    return bits_per_byte(model, ids, len(task.held_out.encode()), options.context)


def _write_bundle(options: TextOptions, task: _Task, student: Any, report: dict[str, Any]) -> Manifest:
    folder = options.work / "student-hf"
    chat = task.checkpoint.chat
    tokenizer_config = {"bos_token": chat.bos_token, "eos_token": chat.eos_token, "add_bos_token": chat.adds_bos}
    if chat.template is not None:
        tokenizer_config["chat_template"] = chat.template
    save_student(student, folder, task.checkpoint.tokenizer_json, task.checkpoint.eos_token_ids[0], tokenizer_config)
    name = options.name or f"{task.checkpoint.name}-{options.student.num_layers}x{options.student.hidden_size}"
    source = f"GPT-2 {options.student.num_layers}x{options.student.hidden_size} distilled from {task.checkpoint.source}"
    loaded = load_folder(folder, name=name, source=source)
    distilled = replace(
        loaded,
        license=task.checkpoint.license,
        eos_token_ids=task.checkpoint.eos_token_ids,
        generation=task.checkpoint.generation,
    )
    export = ExportOptions(
        out=options.out,
        targets=(cpu_int8(),),
        verify_text=DEFAULT_TEXT,
        max_perplexity_ratio=DEFAULT_MAX_PERPLEXITY_RATIO,
        context=options.context,
        name=name,
        version=options.version,
        report=report,
    )
    return export_checkpoint(distilled, export)
