"""What a student is punished for.

The recipe is DistilBERT's and DistilGPT2's (Sanh et al. 2019, arXiv:1910.01108; transformers' research project
``distillation``): cross entropy with the text, Kullback-Leibler divergence from the teacher at a temperature, scaled by
its square (Hinton et al. 2015, arXiv:1503.02531), and the cosine distance of the last hidden states, for a student of
the teacher's width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.distill.batches import Batch
    from export.distill.teacher import Predictions


@dataclass(frozen=True)
class LossWeights:
    """How much each part counts.

    Attributes:
        cross_entropy: of the next token of the corpus.
        divergence: from the teacher's distribution; 0 trains without a teacher.
        temperature: both distributions are softened by; the teacher's cache was made with it.
        prompt: of a position inside a prompt, relative to one inside an answer.
    """

    cross_entropy: float = 1.0
    divergence: float = 0.0
    temperature: float = 2.0
    prompt: float = 0.1


@dataclass(frozen=True)
class HiddenStates:
    """The teacher's last hidden states, computed as they are needed: they are too large to keep.

    Attributes:
        teacher: a transformers model of the student's width and vocabulary.
        weight: how much their cosine distance counts.
    """

    teacher: Any
    weight: float

    def loss(self, student_hidden: Any, input_ids: Any, predicting: Any) -> Any:
        """Mean cosine distance over the positions that predict something."""
        import torch

        with torch.no_grad():
            wanted = self.teacher.base_model(input_ids)[0]
        ours, theirs = (states.reshape(-1, states.shape[-1])[predicting].float() for states in (student_hidden, wanted))
        return self.weight * (1 - torch.nn.functional.cosine_similarity(ours, theirs, dim=-1)).mean()


def batch_loss(
    model: Any,
    batch: Batch,
    weights: LossWeights,
    predictions: Predictions | None,
    hidden_states: HiddenStates | None = None,
) -> tuple[Any, float]:
    """The loss of a batch as a torch scalar, and its mean cross entropy over answers in nats."""
    import torch

    input_ids, predicting = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.predicting)
    hidden = model.base_model(input_ids)[0]
    rows = hidden.reshape(-1, hidden.shape[-1])[predicting]
    logits = model.lm_head(rows).float()
    targets = torch.from_numpy(batch.targets)
    is_answer = torch.from_numpy(batch.is_answer)
    position_weights = is_answer.float() + weights.prompt * (~is_answer).float()
    position_weights = position_weights / position_weights.sum()
    cross_entropy = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    loss = weights.cross_entropy * (cross_entropy * position_weights).sum()
    if predictions is not None and weights.divergence:
        divergence = _divergence(logits / weights.temperature, predictions) * weights.temperature**2
        loss = loss + weights.divergence * (divergence * position_weights).sum()
    if hidden_states is not None:
        loss = loss + hidden_states.loss(hidden, input_ids, predicting)
    return loss, float(cross_entropy.detach()[is_answer].mean()) if bool(is_answer.any()) else 0.0


def _divergence(logits: Any, predictions: Predictions) -> Any:
    """KL(teacher || student) of each position over the teacher's top tokens and one bucket for the rest."""
    import torch

    ids = torch.from_numpy(predictions.token_ids)
    teacher = torch.from_numpy(predictions.log_probs)
    teacher_tail = torch.from_numpy(predictions.tail_log_probs)
    student = torch.log_softmax(logits, dim=-1)
    chosen = student.gather(-1, ids)
    # log(1 - p) without losing a small rest to rounding.
    inside = chosen.logsumexp(dim=-1).clamp(max=-1e-6)
    student_tail = torch.log(-torch.expm1(inside))
    divergence = (teacher.exp() * (teacher - chosen)).sum(dim=-1)
    return divergence + teacher_tail.exp() * (teacher_tail - student_tail)
