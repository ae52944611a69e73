"""The model card that a domain bundle carries: data, teacher, recipe, figures, limits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from export.checkpoint import Checkpoint
    from export.distill.recipe import DistilOptions
    from export.distill.train import TrainSettings
    from export.packs.pack import Pack


def model_card(pack: Pack, name: str, teacher: Checkpoint, options: DistilOptions, figures: Mapping[str, Any]) -> str:
    """Markdown for the bundle's README.md."""
    shape, settings = options.student, options.settings
    utterances = sum(len(intent.templates) for intent in pack.intents) + len(pack.mixed)
    replies = sum(len(reply.templates) for reply in pack.replies)
    taught = (
        f"It learnt from the teacher's predictions, after the teacher had been fine-tuned on the same examples for "
        f"{options.teacher_settings.steps} steps."
        if options.teacher_settings is not None
        else "It learnt from the examples alone; the teacher lent its tokenizer and its token embeddings."
    )
    start = (
        "It went on from the weights of an earlier student; the steps are those since then. "
        if options.start_from is not None
        else ""
    )
    return f"""---
license: {pack.license.lower()}
language: en
library_name: edge-llm
---
# {name}

{pack.description}

A GPT-2 of {shape.num_layers} layers and width {shape.hidden_size} that turns an utterance into kind, actions and a
short answer, for edge_llm (ONNX, int8). It was trained for one pack and answers nothing else.

## Data
The pack `{pack.schema.name}` {pack.schema.version} ({pack.license}), written for this project: {utterances} utterances
of {len(pack.schema.actions)} actions, {replies} utterances of facts, small talk and outside questions. The tool drew
{options.examples} synthetic examples from them (seed {options.seed}): slots filled, sentences joined, case,
punctuation, fillers and slips varied. No recorded speech and no user's words were used.

## Teacher
{teacher.source}, licence {teacher.license}. {taught}

## Recipe
{start}{settings.steps} steps of {settings.batch_tokens} tokens, {_optimizer(settings)}, with warm-up
and cosine decay, weights averaged, vocabulary trimmed to {options.vocabulary} tokens, dropout {options.dropout:g}.

## Figures
On {figures["held_out"]} held-out utterances that were never trained on, before quantisation and without the grammar:
kind and actions exact {figures["kind_and_actions_exact"]:.1%}, the whole answer {figures["answers_exact"]:.1%}.
`quality.json` has the quantisation's figures; docs/benchmarks.md of the project those of the whole daemon.

## Limits
English, and the few sentences in other languages that the pack has. It misunderstands some utterances: a host must not
let it do what cannot be undone, and should ask back where an action says `confirm`. It knows no facts but the pack's.
"""


def _optimizer(settings: TrainSettings) -> str:
    adamw = f"AdamW at learning rate {settings.learning_rate:g}"
    if not settings.matrix_learning_rate:
        return adamw
    return f"Muon at learning rate {settings.matrix_learning_rate:g} for the layers' matrices, {adamw} for the rest"
