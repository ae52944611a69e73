"""A loaded checkpoint: everything that the bundle needs, wherever it came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol

from edge_llm.bundle.manifest import GenerationDefaults

if TYPE_CHECKING:
    from pathlib import Path

    from edge_llm.bundle.manifest import ModelDims
    from export.graph.builder import GraphBuilder
    from export.smoothing import SmoothingGroup
    from export.tensors import Shapes, Tensors


class Architecture(Protocol):
    """A model's configuration, and how it becomes a graph (export/architectures)."""

    takes_positions: ClassVar[bool]

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        ...

    @property
    def context_length(self) -> int:
        """Positions that the model was made for."""
        ...

    def dims(self, max_seq_len: int) -> ModelDims:
        """The bundle's view of the model with a cache of ``max_seq_len`` positions."""
        ...

    def required_shapes(self) -> Shapes:
        """Shapes of the tensors that a checkpoint must hold."""
        ...

    def optional_shapes(self) -> Shapes:
        """Shapes of the tensors that a checkpoint may hold."""
        ...

    def smoothing_groups(self) -> list[SmoothingGroup]:
        """Where channels can be rescaled without changing the model."""
        ...

    def build(self, graph: GraphBuilder, tensors: Tensors, dims: ModelDims) -> None:
        """Append the whole model to ``graph``."""
        ...


@dataclass(frozen=True)
class ChatSettings:
    """What the prompt template is made from.

    Attributes:
        template: the Jinja chat template, or None for a base model.
        bos_token: the string that begins a text, or "".
        eos_token: the string that ends one, or "".
        adds_bos: whether the model expects ``bos_token`` before a prompt that no template writes.
    """

    template: str | None = None
    bos_token: str = ""
    eos_token: str = ""
    adds_bos: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose configuration and shapes have been checked; its weights are read as they are needed.

    Attributes:
        name: what to call the bundle unless the user says otherwise.
        source: where it came from, for the manifest.
        reference: what the float32 reference graph is, as in "dequantised from Q4_1".
        license: the licence of the weights, "unknown" if the checkpoint does not say.
        architecture: configuration and graph recipe.
        tensors: the weights.
        tokenizer_json: contents of tokenizer.json.
        chat: what the prompt template is made from.
        eos_token_ids: tokens that end an answer.
        generation: defaults for a query that sets nothing.
        path: the folder or file, for comparing with transformers; None if it was made in memory.
    """

    name: str
    source: str
    reference: str
    license: str
    architecture: Architecture
    tensors: Tensors
    tokenizer_json: str
    chat: ChatSettings
    eos_token_ids: tuple[int, ...]
    generation: GenerationDefaults = field(default_factory=GenerationDefaults)
    path: Path | None = None
