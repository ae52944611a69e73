"""More wordings from the teacher: shown what is meant, it finds words; those that it understands itself are kept.

The pack's authors have thought of some hundred ways to say a thing; a pretrained teacher knows others. Fine-tuned on
examples in both directions, it samples utterances for actions and replies (``ExampleEncoder.reverse``), reads each one
the other way round, and drops what it would not answer just so. What is left teaches the student, marked as made up.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import msgspec

from edge_llm.domain.schema import Kind
from export.console import progress, say
from export.distill.corpus import Corpus
from export.distill.evaluate import exactness
from export.errors import ExportError
from export.packs.examples import Example, Rephrased
from export.packs.lines import Call, Template, mark_text_slots
from export.packs.wording import Wordings, held_out_forms

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from export.packs.encode import ExampleEncoder
    from export.packs.pack import Pack

_BATCH_ROWS: Final = 64
_MAX_NEW_TOKENS: Final = 40
_TEMPERATURE: Final = 1.0
_TOP_P: Final = 0.95
_MIN_CHARACTERS: Final = 2


class _Row(msgspec.Struct, frozen=True):
    """One kept utterance, as it is stored."""

    text: str
    kind: Kind
    calls: list[tuple[str, dict[str, int | float | str]]]
    answers: list[str]
    source: str


def rephrase(
    teacher: Any, pack: Pack, encoder: ExampleEncoder, meanings: Iterable[Example], count: int, path: Path
) -> None:
    """Sample about ``count`` utterances and append those that pass to ``path``; a second call goes on.

    Args:
        teacher: a transformers causal LM that was trained in both directions.
        pack: its held-out wordings are never kept.
        encoder: for the teacher's tokenizer.
        meanings: endless examples; their words are thrown away.
        count: utterances to sample in all, good or bad.
        path: JSON lines.
    """
    import torch

    progress_path = path.with_suffix(".progress")
    done = int(progress_path.read_text()) if progress_path.exists() else 0
    if done >= count:
        return
    wordings = Wordings(pack)
    seen = held_out_forms(pack)
    for known in _read(path, pack) if path.exists() else []:
        seen |= wordings.of(known.template)
    teacher.eval()
    kept = 0
    say(f"asking the teacher for {count} utterances")
    with progress("rephrasing", count, unit="utterance") as bar, path.open("a", encoding="utf-8") as stream:
        bar.update(done)
        for batch in _batches(meanings, encoder):
            if done >= count:
                break
            torch.manual_seed(done)
            candidates = _sample(teacher, encoder, batch)
            for row in map(_stored, _understood(teacher, encoder, candidates)):
                found = _as_rephrased(row, pack)
                forms = set() if found is None else wordings.of(found.template)
                if forms and not forms & seen:
                    seen |= forms
                    kept += 1
                    stream.write(msgspec.json.encode(row).decode() + "\n")
            stream.flush()
            done += len(batch)
            progress_path.write_text(str(done))
            bar.update(len(batch))
            bar.set_postfix_str(f"{kept} kept")


def read_rephrased(path: Path, pack: Pack) -> list[Rephrased]:
    """What ``rephrase`` wrote, as templates."""
    found = _read(path, pack)
    if not found:
        raise ExportError(f"the teacher found no words that it understands ({path}): fine-tune it for longer")
    return found


def _read(path: Path, pack: Pack) -> list[Rephrased]:
    # Only line feeds part them: an utterance may hold what else ends a line.
    rows = [msgspec.json.decode(line, type=_Row) for line in path.read_text(encoding="utf-8").split("\n") if line]
    return [found for row in rows if (found := _as_rephrased(row, pack)) is not None]


def _batches(meanings: Iterable[Example], encoder: ExampleEncoder) -> Iterator[list[Example]]:
    """Examples whose reversed prompts are equally long, so that no batch needs padding."""
    waiting: dict[int, list[Example]] = defaultdict(list)
    for example in meanings:
        group = waiting[encoder.reverse(example).answer_start]
        group.append(example)
        if len(group) == _BATCH_ROWS:
            yield list(group)
            group.clear()


def _sample(teacher: Any, encoder: ExampleEncoder, batch: Sequence[Example]) -> list[Example]:
    import torch

    prompts = [encoded.token_ids[: encoded.answer_start] for encoded in map(encoder.reverse, batch)]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        output = teacher.generate(
            torch.tensor(prompts),
            attention_mask=torch.ones(len(prompts), len(prompts[0]), dtype=torch.long),
            do_sample=True,
            temperature=_TEMPERATURE,
            top_p=_TOP_P,
            top_k=0,
            max_new_tokens=_MAX_NEW_TOKENS,
            eos_token_id=encoder.end_id,
            pad_token_id=encoder.end_id,
        )
    found = []
    for example, row in zip(batch, output[:, len(prompts[0]) :].tolist(), strict=True):
        if encoder.end_id not in row:
            continue
        text = encoder.decode(row[: row.index(encoder.end_id)]).strip()
        if len(text) >= _MIN_CHARACTERS and text.isprintable() and "\ufffd" not in text:
            found.append(replace(example, text=text))
    return found


def _understood(teacher: Any, encoder: ExampleEncoder, candidates: Sequence[Example]) -> Iterator[Example]:
    """Those that the teacher itself would answer with what was meant, word for word."""
    if not candidates:
        return
    corpus = Corpus.from_sequences(map(encoder.encode, candidates))
    answered = exactness(teacher, corpus, encoder.say_id).answers
    yield from (example for example, right in zip(candidates, answered, strict=True) if right)


def _stored(example: Example) -> _Row:
    calls = [(call.action, dict(call.slots)) for call in example.calls]
    return _Row(example.text, example.kind, calls, list(example.answers), example.source)


def _as_rephrased(row: _Row, pack: Pack) -> Rephrased | None:
    """A template, or None if a text slot's value is not among the words: nothing could be copied from there."""
    calls = tuple(Call(action, slots) for action, slots in row.calls)
    try:
        template = Template(mark_text_slots(row.text, calls, pack.schema, "rephrased"), calls, row.source)
    except ExportError:
        return None
    return Rephrased(template, row.kind, tuple(row.answers))
