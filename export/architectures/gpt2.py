"""GPT-2: learned positions, LayerNorm, one fused QKV matrix, a two-layer MLP (transformers ``GPT2LMHeadModel``)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final

from edge_llm.bundle import graph_io
from edge_llm.bundle.manifest import ModelDims
from export.architectures.settings import Settings
from export.errors import ExportError
from export.graph.activations import gelu_exact, gelu_tanh, relu, sigmoid_linear
from export.graph.attention import attention_layers
from export.graph.gqa import check_head_dim
from export.graph.head import head
from export.graph.norms import add_layer_norm, layer_norm
from export.graph.weights import embedding, linear
from export.smoothing import ChannelSite, SmoothingGroup

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from export.graph.builder import GraphBuilder
    from export.tensors import Shapes, Tensors


_ACTIVATIONS: Final[dict[str, Callable[[GraphBuilder, str, str], str]]] = {
    # Three spellings of the same tanh formula.
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu": gelu_exact,
    "relu": relu,
    "silu": sigmoid_linear,
    "swish": sigmoid_linear,
    "quick_gelu": functools.partial(sigmoid_linear, alpha=1.702),
}


@dataclass(frozen=True)
class Gpt2Config:
    """The part of ``config.json`` that shapes the graph, under its own names where they differ from ``ModelDims``."""

    num_layers: int
    num_heads: int
    hidden_size: int
    inner_size: int
    vocab_size: int
    context_length: int
    layer_norm_epsilon: float
    activation: str
    scale_attn_weights: bool
    scale_attn_by_inverse_layer_idx: bool
    tied: bool

    takes_positions: ClassVar = True

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Gpt2Config:
        """Read ``config.json``. Raises ``ExportError`` naming a setting that is missing or not supported."""
        read = Settings(config, "config.json")
        if config.get("add_cross_attention"):
            raise ExportError("config.json: add_cross_attention is not supported, only decoders are")
        hidden_size = read.integer("n_embd")
        return cls(
            num_layers=read.integer("n_layer"),
            num_heads=read.integer("n_head"),
            hidden_size=hidden_size,
            inner_size=read.integer("n_inner", 4 * hidden_size),
            vocab_size=read.integer("vocab_size"),
            context_length=read.integer("n_positions"),
            layer_norm_epsilon=read.number("layer_norm_epsilon", 1e-5),
            activation=str(config.get("activation_function", "gelu_new")),
            scale_attn_weights=bool(config.get("scale_attn_weights", True)),
            scale_attn_by_inverse_layer_idx=bool(config.get("scale_attn_by_inverse_layer_idx", False)),
            tied=bool(config.get("tie_word_embeddings", True)),
        )

    def __post_init__(self) -> None:
        if self.activation not in _ACTIVATIONS:
            known = ", ".join(_ACTIVATIONS)
            raise ExportError(f"GPT-2 activation_function {self.activation!r} is not supported, only: {known}")
        if self.hidden_size % self.num_heads:
            raise ExportError(f"n_embd {self.hidden_size} is not a multiple of n_head {self.num_heads}")

    def dims(self, max_seq_len: int) -> ModelDims:
        """The bundle's view of the model. Raises ``ExportError`` for heads that the kernel cannot take."""
        dims = ModelDims(
            architecture="gpt2",
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            head_dim=self.hidden_size // self.num_heads,
            hidden_size=self.hidden_size,
            vocab_size=self.vocab_size,
            max_seq_len=max_seq_len,
        )
        check_head_dim(dims, rotary=False)
        return dims

    def required_shapes(self) -> Shapes:
        """Shapes of the tensors that a checkpoint must hold. GPT-2 stores matrices as ``(inputs, outputs)``."""
        hidden, inner = self.hidden_size, self.inner_size
        shapes: dict[str, tuple[int, ...]] = {
            "wte.weight": (self.vocab_size, hidden),
            "wpe.weight": (self.context_length, hidden),
        }
        for layer in range(self.num_layers):
            prefix = f"h.{layer}"
            for name, size in (("attn.c_attn", (hidden, 3 * hidden)), ("attn.c_proj", (hidden, hidden))):
                shapes |= {f"{prefix}.{name}.weight": size, f"{prefix}.{name}.bias": size[1:]}
            for name, size in (("mlp.c_fc", (hidden, inner)), ("mlp.c_proj", (inner, hidden))):
                shapes |= {f"{prefix}.{name}.weight": size, f"{prefix}.{name}.bias": size[1:]}
            for name in ("ln_1", "ln_2"):
                shapes |= {f"{prefix}.{name}.weight": (hidden,), f"{prefix}.{name}.bias": (hidden,)}
        head = {} if self.tied else {"lm_head.weight": (self.vocab_size, hidden)}
        return shapes | {"ln_f.weight": (hidden,), "ln_f.bias": (hidden,)} | head

    def optional_shapes(self) -> Shapes:
        """Shapes of the tensors that a checkpoint may hold: none, GPT-2 has no variants."""
        return {}

    def smoothing_groups(self) -> list[SmoothingGroup]:
        """Where channels can be rescaled without changing the model; names as in ``build``.

        The MLP's inner channels are not among them: an activation function lies between.
        """
        groups = []
        for layer in range(self.num_layers):
            prefix = f"h.{layer}"
            for norm, matrix in (("ln_1", "attn.c_attn"), ("ln_2", "mlp.c_fc")):
                groups.append(_norm_group(f"{prefix}.{norm}", f"{prefix}.{matrix}.weight", axis=0))
            values = f"{prefix}.attn.c_attn"
            groups.append(
                SmoothingGroup(
                    f"layer.{layer}.attention",
                    (
                        ChannelSite(f"{values}.weight", axis=1, start=2 * self.hidden_size),
                        ChannelSite(f"{values}.bias", axis=0, start=2 * self.hidden_size),
                    ),
                    (ChannelSite(f"{prefix}.attn.c_proj.weight", axis=0),),
                )
            )
        return groups if self.tied else [*groups, _norm_group("ln_f", "lm_head.weight", axis=1)]

    def build(self, graph: GraphBuilder, tensors: Tensors, dims: ModelDims) -> None:
        """Append the whole model to ``graph``, from ``input_ids`` to ``logits`` and ``next_token_ids``."""
        positions = graph.initializer("wpe.weight", tensors.read("wpe.weight")[: dims.max_seq_len])
        token = embedding(graph, tensors.read("wte.weight"), "wte")
        position = graph.node("Gather", [positions, graph_io.POSITION_IDS], ["wpe"])
        residual = graph.node("Add", [token, position], ["embedding"])
        parameters = self._norm(graph, tensors, "h.0.ln_1")
        hidden = layer_norm(graph, residual, parameters, "h.0.ln_1", self.layer_norm_epsilon)
        attention = attention_layers(graph, dims)
        for layer in range(self.num_layers):
            prefix = f"h.{layer}"
            qkv = _conv1d(graph, tensors, hidden, f"{prefix}.attn.c_attn")
            attended = attention(qkv, layer, scale=self._attention_scale(layer, dims.head_dim))
            projected = _conv1d(graph, tensors, attended, f"{prefix}.attn.c_proj")
            hidden, residual = self._skip_norm(graph, tensors, residual, projected, f"{prefix}.ln_2")
            inner = _conv1d(graph, tensors, hidden, f"{prefix}.mlp.c_fc")
            activated = _ACTIVATIONS[self.activation](graph, inner, f"{prefix}.mlp.act")
            outer = _conv1d(graph, tensors, activated, f"{prefix}.mlp.c_proj")
            following = f"h.{layer + 1}.ln_1" if layer + 1 < self.num_layers else "ln_f"
            hidden, residual = self._skip_norm(graph, tensors, residual, outer, following)
        head(graph, hidden, tensors, "wte", tied=self.tied)

    def _attention_scale(self, layer: int, head_dim: int) -> float:
        scale = head_dim**-0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale

    def _norm(self, graph: GraphBuilder, tensors: Tensors, name: str) -> tuple[str, str]:
        weight, bias = f"{name}.weight", f"{name}.bias"
        return graph.initializer(weight, tensors.read(weight)), graph.initializer(bias, tensors.read(bias))

    def _skip_norm(
        self, graph: GraphBuilder, tensors: Tensors, residual: str, branch: str, name: str
    ) -> tuple[str, str]:
        """Add a branch to the residual and normalise: returns (normalised, new residual)."""
        parameters = self._norm(graph, tensors, name)
        return add_layer_norm(graph, residual, branch, parameters, name, self.layer_norm_epsilon)


def _norm_group(norm: str, consumer: str, axis: int) -> SmoothingGroup:
    producers = (ChannelSite(f"{norm}.weight", axis=0), ChannelSite(f"{norm}.bias", axis=0))
    return SmoothingGroup(norm, producers, (ChannelSite(consumer, axis),))


def _conv1d(graph: GraphBuilder, tensors: Tensors, x: str, name: str) -> str:
    return linear(graph, x, tensors.read(f"{name}.weight").T, tensors.read(f"{name}.bias"), name)
