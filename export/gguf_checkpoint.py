"""A ``.gguf`` file: metadata, tokenizer and quantised weights in one (llama.cpp's format)."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from export.architectures.gpt2 import Gpt2Config
from export.architectures.llama import QWEN2_BIASED, LlamaConfig
from export.architectures.rope import Rope
from export.architectures.settings import Settings
from export.checkpoint import ChatSettings, Checkpoint
from export.console import say
from export.errors import ExportError
from export.gguf_tokenizer import gguf_tokenizer_json
from export.tensors import to_float32

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from export.checkpoint import Architecture
    from export.tensors import Float32Array, Shapes

_LLAMA_NAMES: Final = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "output": "lm_head",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_GPT2_NAMES: Final = {
    "token_embd": "wte",
    "position_embd": "wpe",
    "output_norm": "ln_f",
    "output": "lm_head",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
    "attn_norm": "ln_1",
    "ffn_norm": "ln_2",
}
_ARCHITECTURES: Final = ("llama", "qwen2", "gpt2")


class GgufWeights:
    """Tensors of a GGUF under their Hugging Face names, dequantised as they are read.

    Raises:
        ExportError: a tensor's type cannot be dequantised; the message names both.
    """

    def __init__(self, path: Path, tensors: list[Any], kind: str) -> None:
        self._path = path
        self._is_gpt2 = kind == "gpt2"
        self._tensors: dict[str, Any] = {}
        for tensor in tensors:
            _check_type(path, tensor)
            self._tensors[self._hf_name(tensor.name)] = tensor

    @property
    def shapes(self) -> Shapes:
        """Shape of every tensor there is."""
        return {name: self._shape(name) for name in self._tensors}

    def read(self, name: str) -> Float32Array:
        """One tensor as float32. Raises ``ExportError`` if it is damaged."""
        import gguf

        tensor = self._tensors[name]
        try:
            array = gguf.dequantize(tensor.data, tensor.tensor_type)
        except (ValueError, IndexError) as error:
            raise ExportError(f"{self._path}: tensor {tensor.name!r} is damaged ({error})") from None
        values = to_float32(array, tensor.name, self._path.name)
        return np.ascontiguousarray(values.T) if self._is_transposed(name) else values

    def _shape(self, name: str) -> tuple[int, ...]:
        # GGUF lists the fastest dimension first; GPT-2's matrices are the other way round in the original.
        shape = tuple(int(size) for size in self._tensors[name].shape)
        return shape if self._is_transposed(name) else shape[::-1]

    def _is_transposed(self, name: str) -> bool:
        return self._is_gpt2 and name.startswith("h.") and len(self._tensors[name].shape) == 2

    def _hf_name(self, name: str) -> str:
        if name == "rope_freqs.weight":
            return "rope_freqs"
        names, layers = (_GPT2_NAMES, "h") if self._is_gpt2 else (_LLAMA_NAMES, "layers")
        found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        if not found or found.group(2) not in names:
            return name
        layer, stem, part = found.groups()
        prefix = f"{layers}.{layer}." if layer is not None else ""
        return f"{prefix}{names[stem]}.{part}"


def load_gguf(path: Path, *, name: str, source: str) -> Checkpoint:
    """Load a GGUF, short of dequantising its weights.

    Raises:
        ExportError: the file is truncated, or its architecture, tokenizer or a tensor's type is not supported.
    """
    metadata, tensors = _read(path)
    kind = metadata.get("general.architecture")
    if kind not in _ARCHITECTURES:
        raise ExportError(f"architecture {kind!r} is not supported in a GGUF, only: {', '.join(_ARCHITECTURES)}")
    names = {tensor.name for tensor in tensors}
    architecture = _read_architecture(metadata, kind, has_head="output.weight" in names)
    weights = GgufWeights(path, tensors, kind)
    tokens = metadata.get("tokenizer.ggml.tokens")
    return Checkpoint(
        name=name,
        source=source,
        reference=_describe_reference(tensors),
        license=str(metadata.get("general.license", "unknown")),
        architecture=architecture,
        tensors=weights,
        tokenizer_json=gguf_tokenizer_json(metadata),
        chat=_read_chat(metadata, tokens if isinstance(tokens, list) else []),
        eos_token_ids=_read_eos_ids(metadata),
        path=path,
    )


def _read(path: Path) -> tuple[dict[str, Any], list[Any]]:
    try:
        import gguf
    except ImportError:
        raise ExportError("reading a GGUF needs the gguf package: pip install 'edge-llm[export-lite]'") from None
    say(f"reading {path.name}")
    try:
        reader = gguf.GGUFReader(str(path))
        # Entries that describe the container itself, such as GGUF.version, are not the model's.
        fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
        return {key: field.contents() for key, field in fields.items()}, list(reader.tensors)
    except OSError as error:
        raise ExportError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:
        unknown = re.search(r"(\d+)\)? is not a valid GGMLQuantizationType", str(error))
        if unknown:
            raise ExportError(
                f"{path} holds a tensor of type number {unknown.group(1)}, which this gguf package does not know: "
                f"convert it to Q8_0 or F16"
            ) from None
        raise ExportError(f"{path} is truncated or not a GGUF ({error}): download it again") from None


def _check_type(path: Path, tensor: Any) -> None:
    import gguf

    float_types = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
    if tensor.tensor_type in float_types:
        return
    width = gguf.GGML_QUANT_SIZES[tensor.tensor_type][1]
    try:
        gguf.dequantize(np.zeros((1, width), np.uint8), tensor.tensor_type)
    except NotImplementedError:
        raise ExportError(
            f"{path}: tensor {tensor.name!r} is of type {tensor.tensor_type.name}, which is not supported: "
            f"convert the model to Q8_0 or F16"
        ) from None


def _describe_reference(tensors: list[Any]) -> str:
    """What the float32 reference is made from: the type that most matrix weights have."""
    counts: Counter[str] = Counter()
    for tensor in tensors:
        if len(tensor.shape) == 2 and tensor.name.startswith("blk."):
            counts[tensor.tensor_type.name] += int(tensor.n_elements)
    kind = counts.most_common(1)[0][0] if counts else "F32"
    return f"{kind} weights" if kind in ("F32", "F16", "BF16") else f"dequantised from {kind}"


def _read_architecture(metadata: Mapping[str, Any], kind: str, *, has_head: bool) -> Architecture:
    prefix = f"{kind}."
    values = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    read = Settings(values, f"GGUF metadata {kind}")
    vocab_size = len(metadata.get("tokenizer.ggml.tokens", ()))
    vocab_size = read.integer("vocab_size", vocab_size or None)
    hidden_size, num_heads = read.integer("embedding_length"), read.integer("attention.head_count")
    if kind == "gpt2":
        return Gpt2Config(
            num_layers=read.integer("block_count"),
            num_heads=num_heads,
            hidden_size=hidden_size,
            inner_size=read.integer("feed_forward_length", 4 * hidden_size),
            vocab_size=vocab_size,
            context_length=read.integer("context_length"),
            layer_norm_epsilon=read.number("attention.layer_norm_epsilon", 1e-5),
            activation="gelu_new",
            scale_attn_weights=True,
            scale_attn_by_inverse_layer_idx=False,
            tied=not has_head,
        )
    if values.get("expert_count"):
        raise ExportError("mixture-of-experts models are not supported")
    head_dim = read.integer("attention.key_length", max(1, hidden_size // num_heads))
    if read.integer("rope.dimension_count", head_dim) != head_dim:
        raise ExportError("rotary positions over a part of the head are not supported")
    context_length = read.integer("context_length")
    return LlamaConfig(
        num_layers=read.integer("block_count"),
        num_heads=num_heads,
        num_kv_heads=read.integer("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        hidden_size=hidden_size,
        inner_size=read.integer("feed_forward_length"),
        vocab_size=vocab_size,
        # Up to the window's length, sliding attention is plain attention.
        context_length=min(context_length, read.integer("attention.sliding_window", context_length)),
        rms_norm_eps=read.number("attention.layer_norm_rms_epsilon", 1e-6),
        rope=_read_rope(values, read),
        rotary_interleaved=kind == "llama",
        tied=not has_head,
        biased=QWEN2_BIASED if kind == "qwen2" else (),
    )


def _read_rope(values: Mapping[str, Any], read: Settings) -> Rope:
    scaling = values.get("rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise ExportError(f"GGUF: rope scaling of type {scaling!r} is not supported, only linear")
    factor = read.number("rope.scaling.factor", 1.0) if scaling == "linear" else 1.0
    return Rope(read.number("rope.freq_base", 10000.0), linear_factor=factor)


def _read_chat(metadata: Mapping[str, Any], tokens: list[str]) -> ChatSettings:
    def text_of(key: str) -> str:
        token_id = metadata.get(f"tokenizer.ggml.{key}")
        return tokens[token_id] if isinstance(token_id, int) and 0 <= token_id < len(tokens) else ""

    template = metadata.get("tokenizer.chat_template")
    # llama.cpp's default where the file does not say.
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token", metadata.get("tokenizer.ggml.pre") == "llama-bpe")
    return ChatSettings(
        template=template if isinstance(template, str) else None,
        bos_token=text_of("bos_token_id"),
        eos_token=text_of("eos_token_id"),
        adds_bos=bool(adds_bos),
    )


def _read_eos_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    found = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return tuple(dict.fromkeys(token_id for token_id in found if isinstance(token_id, int)))
