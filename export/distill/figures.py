"""What is said of a student in its bundle: exactness on held-out lines, and bits per byte of what people wrote."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edge_llm.domain.schema import USER_TOKEN
from export.console import say
from export.distill.evaluate import bits_per_byte, exactness, line_bits_per_byte
from export.torch_model import model_from_tensors
from export.verify import DEFAULT_TEXT
from export.vocabulary import trim_checkpoint

if TYPE_CHECKING:
    from export.distill.recipe import Basis


def held_out_figures(model: Any, basis: Basis, name: str) -> dict[str, Any]:
    """Judge a model on the held-out lines, and say how it did."""
    found = exactness(model, basis.held_out, basis.encoder.say_id)
    count = len(found.actions)
    actions, answers = (sum(right) / count for right in (found.actions, found.answers))
    say(f"{name}: held out {count}, kind and actions exact {actions:.1%}, the whole answer {answers:.1%}")
    return {"held_out": count, "kind_and_actions_exact": round(actions, 4), "answers_exact": round(answers, 4)}


def bits_per_byte_figures(student: Any, taught: Any | None, basis: Basis, context: int) -> dict[str, Any]:
    """How well each model predicts what people write: the held-out utterances, and the project's prose.

    The teacher is measured as it came, over the same vocabulary, and once more after it was taught the pack.

    Args:
        student: a transformers causal LM.
        taught: the teacher after its fine-tuning, if it had one.
        basis: vocabulary, teacher and held-out lines.
        context: positions that a model sees of the prose at once.
    """
    tokenizer = basis.encoder.tokenizer
    utterances = [
        basis.held_out.sequence(index)[1 : basis.held_out.answer_starts[index] - 1].tolist()
        for index in range(len(basis.held_out))
    ]
    utterance_bytes = sum(len(tokenizer.decode(line).encode()) for line in utterances)
    text = DEFAULT_TEXT.read_text(encoding="utf-8")
    prose, prose_bytes = tokenizer.encode(text), len(text.encode())
    figures: dict[str, Any] = {"utterance_bytes": utterance_bytes, "prose_bytes": prose_bytes}
    original = model_from_tensors(trim_checkpoint(basis.teacher, basis.trimmed))
    end_id = basis.trimmed.kept_ids.tolist().index(basis.teacher.eos_token_ids[0])
    models = {"student": (student, tokenizer.token_id(USER_TOKEN)), "teacher": (original, end_id)}
    if taught is not None:
        models["taught_teacher"] = (taught, tokenizer.token_id(USER_TOKEN))
    for name, (model, first) in models.items():
        figures[name] = {
            "utterances": round(line_bits_per_byte(model, [[first, *line] for line in utterances], utterance_bytes), 4),
            "prose": round(bits_per_byte(model, [first, *prose], prose_bytes, context), 4),
        }
    return figures
