"""A domain student from a teacher and a pack, stage by stage::

    WORK/tokenizer.json                 the trimmed vocabulary
    WORK/teacher.npz    teacher/        the teacher's examples, and its fine-tuning
    WORK/rephrased-<key>.jsonl          the wordings that it found
    WORK/corpus.npz     teacher-<key>/  the student's examples, and the teacher's predictions for them
    WORK/student/                       the student's training
    WORK/student-hf/                    the student as a Hugging Face folder

Each stage is kept in the work folder and done once; one that was interrupted goes on where it was.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import tokenizers

from edge_llm.domain.schema import END_TOKEN, REPLY_TOKEN, USER_TOKEN
from edge_llm.engine.tokenizer import Tokenizer
from export.checkpoints import load_checkpoint
from export.distill.card import model_card
from export.distill.corpus import Corpus, example_corpus
from export.distill.figures import bits_per_byte_figures, held_out_figures
from export.distill.rephrase import read_rephrased, rephrase
from export.distill.student import StudentShape, new_student, save_student, start_from, take_embeddings, weights_digest
from export.distill.teacher import CacheKey, TeacherCache
from export.distill.train import Trainer, TrainSettings
from export.errors import ExportError
from export.graph.weights import cpu_int8
from export.hf_checkpoint import load_folder
from export.package import check_destination
from export.packs.encode import ExampleEncoder
from export.packs.examples import ExampleMaker, held_out_examples
from export.packs.wording import check_wordings
from export.pipeline import DomainParts, ExportOptions, export_checkpoint
from export.torch_model import model_from_tensors
from export.verify import DEFAULT_MAX_PERPLEXITY_RATIO, DEFAULT_TEXT
from export.vocabulary import TrimmedVocabulary, add_special_tokens, trim_checkpoint, trim_vocabulary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from edge_llm.bundle.manifest import Manifest
    from export.checkpoint import Checkpoint
    from export.packs.encode import EncodedExample
    from export.packs.examples import Example
    from export.packs.pack import Pack

# Enough examples to see every word of a pack; the vocabulary is chosen from them.
_VOCABULARY_EXAMPLES: Final = 60_000
_CALIBRATION_EXAMPLES: Final = 400
_MAX_ANSWER_TOKENS: Final = 160
# Roughly what an example has; the teacher sees each of its own about once.
_TOKENS_AN_EXAMPLE: Final = 22
CHAT_TEMPLATE: Final = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    f"{USER_TOKEN}" + "{{ message['content'] }}{% else %}"
    f"{REPLY_TOKEN}" + "{{ message['content'] }}" + f"{END_TOKEN}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}" + f"{REPLY_TOKEN}" + "{% endif %}"
)


@dataclass(frozen=True)
class DistilOptions:
    """What the user asked for.

    Attributes:
        teacher: as for ``load_checkpoint``.
        out: the bundle folder to write.
        work: the folder for everything in between.
        student: layers and width.
        vocabulary: the most tokens, the pack's own included.
        context: positions of the student.
        examples: size of the corpus.
        settings: of the student's training.
        teacher_settings: of the teacher's fine-tuning; None distils nothing.
        rephrased: utterances that the fine-tuned teacher is asked for, good or bad.
        top_k: predictions of the teacher that are kept of each position.
        dropout: of the student.
        embeddings: whether the student starts from the teacher's token embeddings.
        start_from: folder of an earlier student whose weights this one goes on with; None starts anew.
        echo_every: an exercise in copying comes after so many of the student's examples; 0 is none.
        cut_share: share of examples that end a few tokens into their text: more of them for the same time.
        seed: of examples and weights.
        name: of the bundle; None is the pack's with ``-gpt2``.
        version: of the bundle.
    """

    teacher: str
    out: Path
    work: Path
    settings: TrainSettings
    student: StudentShape = field(default_factory=lambda: StudentShape(6, 384))
    vocabulary: int = 8192
    context: int = 256
    examples: int = 300_000
    teacher_settings: TrainSettings | None = None
    rephrased: int = 0
    top_k: int = 16
    dropout: float = 0.0
    embeddings: bool = True
    start_from: Path | None = None
    echo_every: int = 0
    cut_share: float = 0.7
    seed: int = 0
    name: str | None = None
    version: str = "1"


@dataclass(frozen=True)
class Basis:
    """What teacher and student have in common."""

    teacher: Checkpoint
    trimmed: TrimmedVocabulary
    tokenizer_json: str
    vocab_size: int
    encoder: ExampleEncoder
    held_out: Corpus


class DomainTeacher(NamedTuple):
    """A teacher that has learnt a pack. ``identity`` is all that it was made from."""

    model: Any
    identity: str


def distil(pack: Pack, options: DistilOptions) -> Manifest:
    """Train a student for a pack and write its bundle.

    Raises:
        ExportError: anything about the input, the disk or the quality; the work folder keeps what was done.
    """
    check_destination(options.out)
    check_wordings(pack)
    # 1. The vocabulary.
    basis = make_basis(pack, options)
    teacher, rephrased = None, []
    if options.teacher_settings is not None:
        # 2. The teacher learns the pack, and finds more words for what is in it.
        teacher = _domain_teacher(basis, pack, options, options.teacher_settings)
        if options.rephrased:
            meanings = ExampleMaker(pack, options.seed + 2, noise=False)
            name = hashlib.sha256(f"{teacher.identity} {meanings.source}".encode()).hexdigest()[:16]
            path = options.work / f"rephrased-{name}.jsonl"
            rephrase(teacher.model, pack, basis.encoder, meanings, options.rephrased, path)
            rephrased = read_rephrased(path, pack)
    # 3. The corpus, and what the teacher says to it.
    examples = ExampleMaker(pack, options.seed, rephrased=rephrased)
    corpus = _corpus("corpus", examples, basis, options.examples, options, echo_every=options.echo_every)
    targets = None if teacher is None else _predictions(teacher, corpus, options)
    # 4. The student learns from both.
    student = train_student(basis, corpus, targets, options)
    taught = None if teacher is None else teacher.model
    report = {
        **held_out_figures(student, basis, "student"),
        "bits_per_byte": bits_per_byte_figures(student, taught, basis, options.context),
    }
    return write_bundle(pack, basis, student, report, options)


def make_basis(pack: Pack, options: DistilOptions) -> Basis:
    """The teacher's tokenizer, trimmed to what the pack needs, and the held-out lines."""
    checkpoint = load_checkpoint(options.teacher)
    longest = checkpoint.architecture.context_length
    if options.teacher_settings is not None and options.context > longest:
        raise ExportError(f"--context {options.context} is too long: the teacher takes at most {longest} positions")
    tokens = pack.schema.special_tokens()
    texts = _texts(ExampleMaker(pack, options.seed), _VOCABULARY_EXAMPLES)
    trimmed = trim_vocabulary(checkpoint.tokenizer_json, texts, options.vocabulary - len(tokens))
    tokenizer_json = add_special_tokens(trimmed, tokens)
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(tokenizer_json))
    encoder = ExampleEncoder(pack.schema, tokenizer)
    held_out = _held_out(pack, encoder, options.context)
    options.work.mkdir(parents=True, exist_ok=True)
    (options.work / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    return Basis(checkpoint, trimmed, tokenizer_json, tokenizer.vocab_size, encoder, held_out)


def _corpus(
    name: str,
    examples: ExampleMaker,
    basis: Basis,
    count: int,
    options: DistilOptions,
    *,
    both_ways: bool = False,
    echo_every: int = 0,
) -> Corpus:
    """The corpus of that name in the work folder, written if it is not there for the same input.

    Args:
        name: of its file.
        examples: where they come from.
        basis: encodes them.
        count: how many.
        options: the folder and the longest example.
        both_ways: every second one is reversed.
        echo_every: an exercise in copying comes after so many; 0 is none.
    """
    path = options.work / f"{name}.npz"
    key_path = options.work / f"{name}.key"
    parts = [basis.tokenizer_json, examples.source, count, options.context, both_ways, echo_every, options.cut_share]
    key = hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()
    if path.exists() and key_path.exists() and key_path.read_text() == key:
        return Corpus.load(path)
    # Whatever is interrupted from here on, the old key must not vouch for the new corpus.
    key_path.unlink(missing_ok=True)
    rng = random.Random(options.seed)  # noqa: S311 - not for secrets

    def forwards(example: Example) -> EncodedExample:
        encoded = basis.encoder.encode(example)
        return basis.encoder.beginning(encoded) if rng.random() < options.cut_share else encoded

    ways = itertools.cycle([forwards, basis.encoder.reverse] if both_ways else [forwards])
    encoded: Iterator[EncodedExample] = (way(example) for way, example in zip(ways, examples, strict=False))
    if echo_every:
        encoded = _with_echoes(encoded, examples, basis.encoder, echo_every)
    corpus = example_corpus(encoded, count, options.context)
    corpus.save(path)
    key_path.write_text(key)
    return corpus


def _with_echoes(
    encoded: Iterable[EncodedExample], maker: ExampleMaker, encoder: ExampleEncoder, every: int
) -> Iterator[EncodedExample]:
    """Exercises in copying among the examples: a small model learns it late from utterances alone."""
    for number, example in enumerate(encoded, 1):
        yield example
        if number % every == 0:
            yield encoder.echo(maker.echo())


def _held_out(pack: Pack, encoder: ExampleEncoder, context: int) -> Corpus:
    examples = held_out_examples(pack)
    if not examples:
        raise ExportError(f"the pack {pack.schema.name} has no held-out lines to judge the student by: write some")
    encoded = [encoder.encode(example) for example in examples]
    longest, example = max(
        zip((len(one.token_ids) for one in encoded), examples, strict=True), key=lambda pair: pair[0]
    )
    if longest > context:
        raise ExportError(f"{example.text!r} and its answer have {longest} tokens: raise --context, now {context}")
    return Corpus.from_sequences(encoded)


def train_student(basis: Basis, corpus: Corpus, targets: TeacherCache | None, options: DistilOptions) -> Any:
    """The student, trained; a transformers model."""
    student = new_student(options.student, basis.vocab_size, options.context, options.dropout, options.seed)
    if options.embeddings:
        table = "wte.weight" if "wte.weight" in basis.teacher.tensors.shapes else "embed_tokens.weight"
        take_embeddings(student, basis.teacher.tensors.read(table)[basis.trimmed.kept_ids])
    origin = f"{basis.teacher.source}, {options.student}, dropout {options.dropout}, embeddings {options.embeddings}"
    if options.start_from is not None:
        start_from(student, options.start_from, basis.tokenizer_json)
        origin += f", from {weights_digest(student)}"
    trainer = Trainer(student, corpus, options.settings, options.work / "student", targets, origin)
    trainer.run(watch=_watch(student, basis))
    return trainer.averaged()


def write_bundle(
    pack: Pack, basis: Basis, student: Any, figures: Mapping[str, Any], options: DistilOptions
) -> Manifest:
    """Export the student with its figures on the pack's held-out lines."""
    folder = options.work / "student-hf"
    tokenizer_config = {"eos_token": END_TOKEN, "chat_template": CHAT_TEMPLATE, "add_bos_token": False}
    save_student(student, folder, basis.tokenizer_json, basis.encoder.end_id, tokenizer_config)
    name = options.name or f"{pack.schema.name}-gpt2"
    checkpoint = replace(load_folder(folder, name=name, source=_source(pack, basis, options)), license=pack.license)
    examples = map(basis.encoder.encode, ExampleMaker(pack, options.seed + 1))
    fitting = (example.token_ids for example in examples if len(example.token_ids) <= options.context)
    calibrate = list(itertools.islice(fitting, _CALIBRATION_EXAMPLES))
    verify = [basis.held_out.sequence(index).tolist() for index in range(len(basis.held_out))]
    card = model_card(pack, name, basis.teacher, options, figures)
    export = ExportOptions(
        out=options.out,
        targets=(cpu_int8(),),
        verify_text=DEFAULT_TEXT,
        max_perplexity_ratio=DEFAULT_MAX_PERPLEXITY_RATIO,
        context=options.context,
        name=name,
        version=options.version,
        generation={"max_tokens": _MAX_ANSWER_TOKENS},
        domain=DomainParts(pack.schema, calibrate, verify, {"domain": dict(figures)}, card),
    )
    return export_checkpoint(checkpoint, export)


def _source(pack: Pack, basis: Basis, options: DistilOptions) -> str:
    shape = options.student
    return (
        f"GPT-2 {shape.num_layers}x{shape.hidden_size} trained on the pack {pack.schema.name} {pack.schema.version}, "
        f"tokenizer and embeddings from {basis.teacher.source}"
    )


def _domain_teacher(basis: Basis, pack: Pack, options: DistilOptions, settings: TrainSettings) -> DomainTeacher:
    """The teacher over the trimmed vocabulary with the pack's tokens, fine-tuned on the pack."""
    import torch
    import transformers

    teacher = model_from_tensors(trim_checkpoint(basis.teacher, basis.trimmed))
    # It explains at length how it draws the new rows.
    transformers.logging.set_verbosity_error()
    # The new rows are drawn at random.
    torch.manual_seed(options.seed)
    teacher.resize_token_embeddings(basis.vocab_size, mean_resizing=True)
    teacher.config._attn_implementation = "sdpa"
    count = max(1, settings.steps * settings.batch_tokens // _TOKENS_AN_EXAMPLE)
    examples = ExampleMaker(pack, options.seed + 3)
    corpus = _corpus("teacher", examples, basis, count, options, both_ways=options.rephrased > 0)
    trainer = Trainer(teacher, corpus, settings, options.work / "teacher", origin=basis.teacher.source)
    trainer.run(watch=_watch(teacher, basis))
    teacher = trainer.averaged()
    held_out_figures(teacher, basis, "teacher")
    identity = json.dumps([basis.teacher.source, asdict(settings), corpus.digest], sort_keys=True)
    return DomainTeacher(teacher, identity)


def _predictions(teacher: DomainTeacher, corpus: Corpus, options: DistilOptions) -> TeacherCache:
    key = CacheKey(teacher.identity, corpus.digest, options.top_k, options.settings.loss.temperature)
    cache = TeacherCache(options.work, key, int(corpus.token_ids.size))
    cache.fill(teacher.model, corpus)
    return cache


def _watch(model: Any, basis: Basis) -> Callable[[int], None]:
    def report(step: int) -> None:
        held_out_figures(model, basis, f"step {step}")

    return report


def _texts(maker: ExampleMaker, count: int) -> list[str]:
    examples = itertools.islice(iter(maker), count)
    return [text for example in examples for text in (example.text, *example.answers)]
