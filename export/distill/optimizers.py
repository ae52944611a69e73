"""Muon for the layers' matrices, AdamW for the rest, as one optimiser.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon; Liu et al. 2025, arXiv:2502.16982) makes the update of a
matrix nearly orthogonal, so that rare directions are learnt as fast as common ones. A student without pre-training has
many of those: docs/export.md has what it is worth. It is for matrices between hidden states; embeddings, the head,
biases and gains stay with AdamW.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

_ADAMW_BETAS: Final = (0.9, 0.98)


class Optimizers:
    """Updates a model's weights; the rate of each part is a factor times its own.

    Args:
        model: a transformers causal LM.
        learning_rate: of AdamW.
        matrix_learning_rate: of Muon, in AdamW's measure (the root mean square of an update); 0 gives AdamW those
            matrices, too.
        weight_decay: of matrices, decoupled.
    """

    def __init__(self, model: Any, learning_rate: float, matrix_learning_rate: float, weight_decay: float) -> None:
        import torch

        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
        embeddings.add(id(model.get_output_embeddings().weight))
        matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
        vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
        by_muon = [p for p in matrices if p.dim() == 2 and id(p) not in embeddings] if matrix_learning_rate else []
        chosen = {id(parameter) for parameter in by_muon}
        groups = [
            {"params": [p for p in matrices if id(p) not in chosen], "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self._parts: list[tuple[Any, float]] = [
            (torch.optim.AdamW(groups, lr=learning_rate, betas=_ADAMW_BETAS), learning_rate)
        ]
        if by_muon:
            muon = torch.optim.Muon(
                by_muon, lr=matrix_learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
            )
            self._parts.append((muon, matrix_learning_rate))

    def step(self, factor: float) -> None:
        """Apply the gradients at ``factor`` times the learning rates, and forget them."""
        for optimizer, rate in self._parts:
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """All that a later run needs to go on."""
        return {"parts": [optimizer.state_dict() for optimizer, _ in self._parts]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict``."""
        # Checkpoints of before Muon hold AdamW's state alone.
        parts = state.get("parts", [state])
        for (optimizer, _), saved in zip(self._parts, parts, strict=True):
            optimizer.load_state_dict(saved)
