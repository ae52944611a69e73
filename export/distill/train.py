"""The training loop: resumable to the same loss curve, for a teacher's fine-tuning and for a student alike."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from export.console import progress, say
from export.distill.batches import BatchOrder, make_batch
from export.distill.curve import write_picture, write_table
from export.distill.losses import LossWeights, batch_loss
from export.distill.optimizers import Optimizers
from export.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from export.distill.corpus import Corpus
    from export.distill.losses import HiddenStates
    from export.distill.teacher import TeacherCache

_CHECKPOINT: Final = "checkpoint.pt"
_CURVE_EVERY: Final = 20


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Attributes:
        steps: updates in all.
        batch_tokens: tokens a step, padding included.
        learning_rate: of AdamW after the warm-up; it falls to a tenth along a cosine.
        matrix_learning_rate: of Muon, for the layers' matrices; 0 leaves them to AdamW.
        warmup_share: share of the steps over which it rises.
        weight_decay: of matrices, decoupled.
        clip_norm: gradients are scaled down to this norm.
        seed: of the order of batches and of dropout.
        average_from: share of the steps after which weights are averaged (exponentially); 1 switches it off.
        checkpoint_s: seconds between checkpoints.
        loss: what is minimised.
    """

    steps: int
    batch_tokens: int = 2048
    learning_rate: float = 1e-3
    matrix_learning_rate: float = 0.0
    warmup_share: float = 0.03
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    seed: int = 0
    average_from: float = 0.5
    checkpoint_s: float = 120.0
    loss: LossWeights = field(default_factory=LossWeights)


_AVERAGE_DECAY: Final = 0.999


class Trainer:
    """One model's training in one folder.

    Args:
        model: a transformers causal LM; it is trained in place.
        corpus: what on.
        settings: how. A folder with a checkpoint of other settings is refused.
        folder: checkpoint and loss curve.
        targets: the teacher's predictions for this corpus, if the loss needs them.
        origin: says which model it is and where its weights come from; another one's checkpoint is refused.
        hidden_states: the teacher's, if the loss needs them.

    Raises:
        ExportError: the folder's checkpoint is damaged, or is of another run.
    """

    def __init__(
        self,
        model: Any,
        corpus: Corpus,
        settings: TrainSettings,
        folder: Path,
        targets: TeacherCache | None = None,
        origin: str = "",
        hidden_states: HiddenStates | None = None,
    ) -> None:
        self.model = model
        self.step = 0
        self._corpus = corpus
        self._settings = settings
        self._folder = folder
        self._targets = targets
        self._hidden_states = hidden_states
        self._order = BatchOrder(corpus, settings.batch_tokens, settings.seed)
        self._curve: list[dict[str, float]] = []
        self._window: list[tuple[float, float]] = []  # loss and cross entropy of the steps since the curve's last point
        self._average: dict[str, Any] | None = None
        # What the checkpoint belongs to; only the length of a run may be changed on the way.
        self._identity = {
            **asdict(settings),
            "corpus": corpus.digest,
            "teacher": targets and targets.key.digest,
            "model": origin,
            "hidden": hidden_states.weight if hidden_states is not None else 0.0,
        }
        for free in ("steps", "checkpoint_s"):
            del self._identity[free]
        self._optimizers = Optimizers(
            model, settings.learning_rate, settings.matrix_learning_rate, settings.weight_decay
        )
        folder.mkdir(parents=True, exist_ok=True)
        self._resume()

    def run(self, *, until: int | None = None, watch: Callable[[int], None] | None = None) -> None:
        """Train to the last step, or to ``until``; a checkpoint is written now and then, and at the end.

        Args:
            until: stop after this many steps in all; a later ``run`` goes on.
            watch: called with the step after every checkpoint.

        Raises:
            ExportError: the loss is not a number any more.
        """
        import torch

        settings = self._settings
        last = min(until or settings.steps, settings.steps)
        if self.step < last:
            say(f"training: steps {self.step} to {last} of {settings.steps}")
        saved_at = time.monotonic()
        self.model.train()
        with progress("training", settings.steps, unit="step") as bar:
            bar.update(self.step)
            tokens, began = 0, time.monotonic()
            while self.step < last:
                # Dropout must not depend on where a run was interrupted.
                torch.manual_seed(settings.seed * 1_000_003 + self.step)
                loss, cross_entropy, seen = self._update()
                self._window.append((loss, cross_entropy))
                tokens += seen
                self.step += 1
                bar.update()
                if self.step % _CURVE_EVERY == 0 or self.step == settings.steps:
                    self._note(tokens / max(time.monotonic() - began, 1e-9))
                    bar.set_postfix_str(
                        f"loss {self._curve[-1]['loss']:.3f}, {self._curve[-1]['tokens_per_s']:.0f} tokens/s"
                    )
                    tokens, began = 0, time.monotonic()
                if time.monotonic() - saved_at > settings.checkpoint_s and self.step < last:
                    self._save()
                    saved_at = time.monotonic()
                    if watch is not None:
                        watch(self.step)
                        self.model.train()
        self._save()
        if self._curve:
            write_picture(self._curve, self._folder)

    def averaged(self) -> Any:
        """The model with the averaged weights, ready to use; the weights as they are if nothing was averaged."""
        if self._average is not None:
            self.model.load_state_dict(self._average, strict=False)
        self.model.eval()
        return self.model

    @property
    def losses(self) -> list[float]:
        """The loss curve, one value for every ``_CURVE_EVERY`` steps."""
        return [point["loss"] for point in self._curve]

    def _update(self) -> tuple[float, float, int]:
        import torch

        settings = self._settings
        batch = make_batch(self._corpus, self._order.indices(self.step))
        predictions = self._targets.read(batch.corpus_positions) if self._targets is not None else None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, cross_entropy = batch_loss(self.model, batch, settings.loss, predictions, self._hidden_states)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_norm)
        self._optimizers.step(schedule(self.step, settings))
        self._update_average()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ExportError(
                f"the loss is {value} at step {self.step}: lower --learning-rate, and remove {self._folder} to begin "
                f"anew"
            )
        return value, cross_entropy, int(batch.input_ids.size)

    def _update_average(self) -> None:
        import torch

        settings = self._settings
        if self.step < settings.average_from * settings.steps:
            return
        current = {name: value.detach() for name, value in self.model.named_parameters()}
        if self._average is None:
            self._average = {name: value.clone() for name, value in current.items()}
            return
        with torch.no_grad():
            for name, value in current.items():
                self._average[name].lerp_(value, 1 - _AVERAGE_DECAY)

    def _note(self, tokens_per_s: float) -> None:
        losses, entropies = zip(*self._window, strict=True)
        self._window = []
        self._curve.append(
            {
                "step": self.step,
                "loss": float(np.mean(losses)),
                "answer_cross_entropy": float(np.mean(entropies)),
                "learning_rate": self._settings.learning_rate * schedule(self.step - 1, self._settings),
                "tokens_per_s": tokens_per_s,
            }
        )

    def _save(self) -> None:
        import torch

        partial = self._folder / f"{_CHECKPOINT}.partial"
        state = {
            "identity": self._identity,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self._optimizers.state_dict(),
            "average": self._average,
            "curve": self._curve,
            "window": self._window,
        }
        torch.save(state, partial)
        partial.replace(self._folder / _CHECKPOINT)
        write_table(self._curve, self._folder)

    def _resume(self) -> None:
        import torch

        path = self._folder / _CHECKPOINT
        if not path.exists():
            return
        try:
            state = torch.load(path, weights_only=True)
            identity = dict(state["identity"])
        except Exception as error:  # torch says it in many ways, some of which advise what would be unsafe
            raise ExportError(f"{path} is damaged: remove {self._folder} to begin anew") from error
        # What an older checkpoint does not say cannot contradict.
        changed = [name for name, value in self._identity.items() if identity.get(name, value) != value]
        if changed:
            raise ExportError(
                f"{self._folder} holds a run with another {changed[0]}: give --work another folder, or remove it"
            )
        self.step = int(state["step"])
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError:
            raise ExportError(
                f"{self._folder} holds a run with a model of another shape: give --work another folder, or remove it"
            ) from None
        self._optimizers.load_state_dict(state["optimizer"])
        self._average = state["average"]
        self._curve = state["curve"]
        self._window = [(loss, cross_entropy) for loss, cross_entropy in state.get("window", [])]


def schedule(step: int, settings: TrainSettings) -> float:
    """Factor of the learning rate: a linear rise, then half a cosine down to a tenth."""
    warmup = max(1, round(settings.warmup_share * settings.steps))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, settings.steps - warmup)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
