"""The Llama family: rotary positions, RMSNorm, SwiGLU, grouped key-value heads (Llama, SmolLM, Mistral, Qwen2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np

from edge_llm.bundle.manifest import ModelDims
from export.architectures.rope import Rope
from export.architectures.settings import Settings
from export.errors import ExportError
from export.graph.activations import halves, sigmoid_linear
from export.graph.attention import Frequencies, attention_layers
from export.graph.gqa import check_head_dim
from export.graph.head import head
from export.graph.norms import add_rms_norm, rms_norm
from export.graph.weights import embedding, linear
from export.smoothing import ChannelSite, SmoothingGroup

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from export.graph.builder import GraphBuilder
    from export.tensors import Float32Array, Shapes, Tensors

QWEN2_BIASED: Final = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@dataclass(frozen=True)
class LlamaConfig:
    """The part of a configuration that shapes the graph.

    Attributes:
        rotary_interleaved: whether the rows of Q and K are permuted for rotating neighbours, as in GGUF's ``llama``.
        tied: whether the head is the embedding.
        biased: the linear layers that must have a bias; any may have one.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    inner_size: int
    vocab_size: int
    context_length: int
    rms_norm_eps: float
    rope: Rope
    rotary_interleaved: bool
    tied: bool
    biased: tuple[str, ...] = ()

    takes_positions: ClassVar = False

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """Read ``config.json``. Raises ``ExportError`` naming a setting that is missing or not supported."""
        read = Settings(config, "config.json")
        activation = config.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise ExportError(f"config.json: hidden_act {activation!r} is not supported, only silu")
        if config.get("partial_rotary_factor", 1.0) != 1.0:
            raise ExportError("config.json: partial_rotary_factor other than 1 is not supported")
        hidden_size, num_heads = read.integer("hidden_size"), read.integer("num_attention_heads")
        context_length = read.integer("max_position_embeddings", 2048)
        window = config.get("sliding_window")
        if isinstance(window, int) and config.get("use_sliding_window", True):
            # Up to the window's length, sliding attention is plain attention.
            context_length = min(context_length, window)
        return cls(
            num_layers=read.integer("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=read.integer("num_key_value_heads", num_heads),
            head_dim=read.integer("head_dim", max(1, hidden_size // num_heads)),
            hidden_size=hidden_size,
            inner_size=read.integer("intermediate_size"),
            vocab_size=read.integer("vocab_size"),
            context_length=context_length,
            rms_norm_eps=read.number("rms_norm_eps", 1e-6),
            rope=Rope.from_hf(config),
            rotary_interleaved=False,
            tied=bool(config.get("tie_word_embeddings", False)),
            biased=_biased_layers(config),
        )

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ExportError(
                f"{self.num_heads} attention heads cannot share {self.num_kv_heads} key-value heads evenly"
            )

    def dims(self, max_seq_len: int) -> ModelDims:
        """The bundle's view of the model. Raises ``ExportError`` for heads that the kernel cannot take."""
        dims = ModelDims(
            architecture="llama",
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            hidden_size=self.hidden_size,
            vocab_size=self.vocab_size,
            max_seq_len=max_seq_len,
        )
        check_head_dim(dims, rotary=True)
        return dims

    def _linear_shapes(self) -> dict[str, tuple[int, int]]:
        hidden, inner = self.hidden_size, self.inner_size
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }

    def required_shapes(self) -> Shapes:
        """Shapes of the tensors that a checkpoint must hold; matrices are ``(outputs, inputs)``."""
        table = (self.vocab_size, self.hidden_size)
        shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": table}
        for layer in range(self.num_layers):
            for name, size in self._linear_shapes().items():
                shapes[f"layers.{layer}.{name}.weight"] = size
                if name in self.biased:
                    shapes[f"layers.{layer}.{name}.bias"] = size[:1]
            for name in ("input_layernorm", "post_attention_layernorm"):
                shapes[f"layers.{layer}.{name}.weight"] = (self.hidden_size,)
        shapes["norm.weight"] = (self.hidden_size,)
        return shapes if self.tied else shapes | {"lm_head.weight": table}

    def optional_shapes(self) -> Shapes:
        """Shapes of the tensors that a checkpoint may hold: biases, and a table that divides the rotary frequencies."""
        shapes: dict[str, tuple[int, ...]] = {"rope_freqs": (self.head_dim // 2,)}
        for layer in range(self.num_layers):
            for name, (outputs, _) in self._linear_shapes().items():
                shapes[f"layers.{layer}.{name}.bias"] = (outputs,)
        return shapes

    def inverse_frequencies(self, tensors: Tensors) -> Float32Array:
        """Angle per position of each rotated pair, ``(head_dim / 2,)``; a GGUF may carry divisors for them."""
        frequencies = self.rope.inverse_frequencies(self.head_dim)
        if "rope_freqs" in tensors.shapes:
            frequencies = frequencies / tensors.read("rope_freqs")
        return frequencies

    def smoothing_groups(self) -> list[SmoothingGroup]:
        """Where channels can be rescaled without changing the model; names as in ``build``."""
        groups = []
        for layer in range(self.num_layers):
            prefix = f"layers.{layer}"
            for norm, names in (
                (f"{prefix}.input_layernorm", QWEN2_BIASED),
                (f"{prefix}.post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
            ):
                consumers = tuple(ChannelSite(f"{prefix}.{name}.weight", axis=1) for name in names)
                groups.append(SmoothingGroup(norm, (ChannelSite(f"{norm}.weight", axis=0),), consumers))
            values, up = f"{prefix}.self_attn.v_proj", f"{prefix}.mlp.up_proj"
            groups.append(
                SmoothingGroup(
                    f"layer.{layer}.attention",
                    (ChannelSite(f"{values}.weight", axis=0), ChannelSite(f"{values}.bias", axis=0)),
                    (ChannelSite(f"{prefix}.self_attn.o_proj.weight", axis=1),),
                    shared_heads=self.num_heads // self.num_kv_heads,
                    head_dim=self.head_dim,
                )
            )
            groups.append(
                SmoothingGroup(
                    f"{prefix}.mlp.product",
                    (ChannelSite(f"{up}.weight", axis=0), ChannelSite(f"{up}.bias", axis=0)),
                    (ChannelSite(f"{prefix}.mlp.down_proj.weight", axis=1),),
                )
            )
        if not self.tied:
            groups.append(
                SmoothingGroup("norm", (ChannelSite("norm.weight", axis=0),), (ChannelSite("lm_head.weight", axis=1),))
            )
        return groups

    def build(self, graph: GraphBuilder, tensors: Tensors, dims: ModelDims) -> None:
        """Append the whole model to ``graph``, from ``input_ids`` to ``logits`` and ``next_token_ids``."""
        frequencies = Frequencies(self.inverse_frequencies(tensors), self.rotary_interleaved)
        attention = attention_layers(graph, dims, frequencies)
        residual = embedding(graph, tensors.read("embed_tokens.weight"), "embed_tokens")
        name = "layers.0.input_layernorm"
        hidden = rms_norm(graph, residual, _norm(graph, tensors, name), name, self.rms_norm_eps)
        for layer in range(self.num_layers):
            prefix = f"layers.{layer}"
            names = [f"{prefix}.self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj")]
            qkv = _linear(graph, tensors, hidden, names, f"{prefix}.self_attn.qkv_proj")
            attended = attention(qkv, layer)
            name = f"{prefix}.self_attn.o_proj"
            projected = _linear(graph, tensors, attended, [name], name)
            name = f"{prefix}.post_attention_layernorm"
            hidden, residual = self._skip_norm(graph, tensors, residual, projected, name)
            outer = _swiglu(graph, tensors, hidden, f"{prefix}.mlp", self.inner_size)
            name = f"layers.{layer + 1}.input_layernorm" if layer + 1 < self.num_layers else "norm"
            hidden, residual = self._skip_norm(graph, tensors, residual, outer, name)
        head(graph, hidden, tensors, "embed_tokens", tied=self.tied)

    def _skip_norm(
        self, graph: GraphBuilder, tensors: Tensors, residual: str, branch: str, name: str
    ) -> tuple[str, str]:
        """Add a branch to the residual and normalise: returns (normalised, new residual)."""
        return add_rms_norm(graph, residual, branch, _norm(graph, tensors, name), name, self.rms_norm_eps)


def _biased_layers(config: Mapping[str, Any]) -> tuple[str, ...]:
    if config.get("model_type") == "qwen2":
        return QWEN2_BIASED
    attention_layers = (*QWEN2_BIASED, "self_attn.o_proj") if config.get("attention_bias") else ()
    mlp_layers = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj") if config.get("mlp_bias") else ()
    return attention_layers + mlp_layers


def _swiglu(graph: GraphBuilder, tensors: Tensors, x: str, prefix: str, inner_size: int) -> str:
    """``down(silu(gate(x)) * up(x))``, gate and up in one matrix."""
    both = _linear(graph, tensors, x, [f"{prefix}.gate_proj", f"{prefix}.up_proj"], f"{prefix}.gate_up_proj")
    gate, up = f"{prefix}.gate", f"{prefix}.up"
    halves(graph, both, [gate, up], inner_size)
    activated = sigmoid_linear(graph, gate, f"{prefix}.silu")
    product = graph.node("Mul", [activated, up], [f"{prefix}.product"])
    name = f"{prefix}.down_proj"
    return _linear(graph, tensors, product, [name], name)


def _linear(graph: GraphBuilder, tensors: Tensors, x: str, names: Sequence[str], output: str) -> str:
    """One matrix of several stacked along their outputs, with their biases where any of them has one."""
    weights = [tensors.read(f"{name}.weight") for name in names]
    weight = weights[0] if len(weights) == 1 else np.concatenate(weights)
    return linear(graph, x, weight, _stacked_bias(tensors, names, weights), output)


def _stacked_bias(tensors: Tensors, names: Sequence[str], weights: Sequence[Float32Array]) -> Float32Array | None:
    if not any(f"{name}.bias" in tensors.shapes for name in names):
        return None
    biases = [
        tensors.read(f"{name}.bias") if f"{name}.bias" in tensors.shapes else np.zeros(len(weight), np.float32)
        for name, weight in zip(names, weights, strict=True)
    ]
    return np.concatenate(biases)


def _norm(graph: GraphBuilder, tensors: Tensors, name: str) -> str:
    return graph.initializer(f"{name}.weight", tensors.read(f"{name}.weight"))
