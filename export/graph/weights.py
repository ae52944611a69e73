"""How weight matrices enter a graph: embedding, linear layers and the head, in int8, int4 or floating point."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import numpy as np

from edge_llm.bundle import graph_io
from export.quantize import BLOCK_SIZES, QuantizedWeight, fitting_block_size, pad_rows, quantize

if TYPE_CHECKING:
    from export.graph.builder import GraphBuilder
    from export.tensors import Float32Array

# How a graph attends and appends to its cache: edge_llm/bundle/graph_io.py describes each.
Form: TypeAlias = Literal["gqa", "scatter", "primitive"]
# int8 dot products with activations quantised per block; lower levels are several times slower and no better here.
_ACCURACY_LEVEL: Final = 4
# The table that every token passes through twice keeps 8 bits in a 4-bit build: it is where 4 bits cost the most.
_EMBEDDING_BITS: Final = 8
# At 64 (and 32) onnxruntime's x86-64 kernels sum in the same order for one row as for many, so that a query is answered
# alike, bit for bit, alone and in a batch. At 128 they do not, and int8 activations turn the last bit into whole steps.
DEFAULT_BLOCK_SIZE: Final = 64
# No layer follows the head, so that a last bit stays a last bit there; larger blocks are fewer bytes to read a token.
_HEAD_BLOCK_SIZE: Final = 128


@dataclass(frozen=True)
class Kernels:
    """What a provider's kernels ask of a graph.

    Attributes:
        opset: of the default domain; in it every operator used has a kernel.
        accuracy_level: of ``MatMulNBits``; 0 leaves activations as they are.
        adds_bias: whether ``MatMulNBits`` takes the bias; otherwise it is an ``Add`` behind it.
        gathers_blocks: whether embedding rows are read from the blocks that a tied head multiplies with.
        output_multiple: outputs of a linear layer come in multiples of this.
        vocabulary_multiple: the same of the head, whose rows are padded to it.
        form: how attention is made.
        ir_version: of the file.
        min_onnxruntime: the first release with every kernel and option that the graph and its runner use.
    """

    opset: int
    accuracy_level: int
    adds_bias: bool
    gathers_blocks: bool
    output_multiple: int
    vocabulary_multiple: int
    form: Form = "gqa"
    ir_version: int = 10
    min_onnxruntime: str = "1.23"


CPU_KERNELS: Final = Kernels(
    opset=21,
    accuracy_level=_ACCURACY_LEVEL,
    adds_bias=True,
    gathers_blocks=True,
    output_multiple=1,
    vocabulary_multiple=1,
)
# From ONNX Runtime's source and pull requests of 2024 to 2026; none of it has run on hardware here.
CUDA_KERNELS: Final = Kernels(
    # 21 has a Cast of its own, whose CUDA kernel came later than that of 19; without one it runs on the processor.
    opset=20,
    # CUDA ignores the level. On the CPU, where the graph is verified, activations must not be quantised either.
    accuracy_level=0,
    # CUDA kernels of 2025 throw "MatMulNBits does not support bias in CUDA kernel"; later ones add it afterwards, too.
    adds_bias=False,
    # CUDA has a GatherBlockQuantized, but it is not sure since which release and for which bits. A plain float16 table
    # beside the head's integers costs two bytes a weight.
    gathers_blocks=False,
    # The fast path of matmul_8bits.cu; for other sizes a step dequantises the whole matrix.
    output_multiple=8,
    # The other fast path, fpA_intB, wants 32 for 8 bits and 64 for 4.
    vocabulary_multiple=64,
)
# TensorRT takes standard operators and static shapes only; none of it has run on hardware here.
TENSORRT_KERNELS: Final = Kernels(
    # The first with TensorScatter, which TensorRT's parser knows since 10.15.
    opset=24,
    accuracy_level=0,
    adds_bias=False,
    gathers_blocks=False,
    output_multiple=1,
    # Tensor cores take 8 halves at a time; 64 fill a tile.
    vocabulary_multiple=64,
    form="scatter",
    ir_version=11,
    # The first whose CPU provider, on which the graph is verified, has both operators; 1.24 only knows them.
    min_onnxruntime="1.25",
)
# 10.3, of JetPack 6, parses opsets up to 20; every operator used is in its list since opset 17 or before.
TENSORRT_PRIMITIVE_KERNELS: Final = replace(
    TENSORRT_KERNELS, opset=17, form="primitive", ir_version=8, min_onnxruntime="1.23"
)


@dataclass(frozen=True)
class WeightFormat:
    """How a target stores weights and in what it computes.

    Attributes:
        target: the graph's name in the bundle, ``cpu-int8``, ``cpu-fp32``, ``cuda``, ``tensorrt``, ``tensorrt-int8``
            or ``tensorrt-primitive``.
        bits: of the matrices: 8, 4, or 16 and 32 for floating point.
        block_size: weights of a layer that share a scale, where the matrix allows it (0 for floating point, and for
            int8 with a scale for each output).
        head_block_size: the same of the embedding and the head.
        float_type: of activations, cache, scales and everything that is no matrix.
        kernels: of the provider that the target is for.
    """

    target: str
    bits: Literal[4, 8, 16, 32]
    block_size: int
    head_block_size: int
    float_type: Literal["float32", "float16"] = "float32"
    kernels: Kernels = CPU_KERNELS

    @property
    def is_quantized(self) -> bool:
        """Whether matrices are stored in blocks of integers."""
        return self.block_size > 0

    @property
    def is_qdq(self) -> bool:
        """Whether products are in int8, activations as well, between nodes that quantise and dequantise."""
        return self.bits < 16 and not self.is_quantized

    @property
    def is_static(self) -> bool:
        """Whether every shape is fixed, in two graphs: one for a decode step, one for a prefill chunk."""
        return self.kernels.form != "gqa"

    def padded_vocabulary(self, vocab_size: int) -> int:
        """Rows of the head."""
        multiple = self.kernels.vocabulary_multiple
        return -(-vocab_size // multiple) * multiple


CPU_FP32: Final = WeightFormat("cpu-fp32", 32, 0, 0)


def cpu_int8(bits: Literal[4, 8] = 8, block_size: int = DEFAULT_BLOCK_SIZE) -> WeightFormat:
    """The ``cpu-int8`` target; with ``bits`` 4 its linear layers take half the space.

    Blocks smaller than the default are asked for because they are more exact, so the head has them, too.
    """
    return WeightFormat("cpu-int8", bits, block_size, _head_block_size(block_size))


def cuda(block_size: int = DEFAULT_BLOCK_SIZE) -> WeightFormat:
    """The ``cuda`` target: float16 around the 8-bit matrices of ``cpu-int8``, integer for integer."""
    return WeightFormat("cuda", 8, block_size, _head_block_size(block_size), "float16", CUDA_KERNELS)


def tensorrt(float_type: Literal["float32", "float16"] = "float16") -> WeightFormat:
    """The ``tensorrt`` target, for TensorRT 10.15 and later; in float32 it is compared with ``cpu-fp32``."""
    return WeightFormat("tensorrt", _float_bits(float_type), 0, 0, float_type, TENSORRT_KERNELS)


def tensorrt_int8() -> WeightFormat:
    """The ``tensorrt-int8`` target: ``tensorrt`` with the blocks' products in int8 (export/quantize_qdq.py)."""
    return WeightFormat("tensorrt-int8", 8, 0, 0, "float16", TENSORRT_KERNELS)


def tensorrt_primitive(float_type: Literal["float32", "float16"] = "float16") -> WeightFormat:
    """The ``tensorrt-primitive`` target, for TensorRT 10.3; in float32 it is compared with ``cpu-fp32``."""
    return WeightFormat("tensorrt-primitive", _float_bits(float_type), 0, 0, float_type, TENSORRT_PRIMITIVE_KERNELS)


def _float_bits(float_type: Literal["float32", "float16"]) -> Literal[16, 32]:
    return 16 if float_type == "float16" else 32


def _head_block_size(block_size: int) -> int:
    assert block_size in BLOCK_SIZES
    return block_size if block_size < DEFAULT_BLOCK_SIZE else max(block_size, _HEAD_BLOCK_SIZE)


def linear(graph: GraphBuilder, x: str, weight: Float32Array, bias: Float32Array | None, name: str) -> str:
    """``x @ weight.T + bias``.

    Args:
        graph: the graph.
        x: a tensor ``(batch, seq, K)``.
        weight: ``(N, K)``.
        bias: ``(N,)`` or None.
        name: prefix of the node's and the weights' names.

    Returns:
        The name of the output ``(batch, seq, N)``.
    """
    fused = bias is not None and graph.weights.is_quantized and graph.weights.kernels.adds_bias
    product = name if bias is None or fused else f"{name}.product"
    if graph.weights.is_quantized:
        block_size = fitting_block_size(weight.shape[1], graph.weights.block_size)
        quantized = quantize(weight, graph.weights.bits, block_size)
        inputs = [x, *_store_blocks(graph, name, quantized)]
        if bias is not None and fused:
            inputs += ["", "", graph.initializer(f"{name}.bias", bias)]
        _matmul_nbits(graph, inputs, product, quantized)
    else:
        graph.node("MatMul", [x, graph.initializer(f"{name}.weight", weight.T)], [product])
    if bias is None or fused:
        return product
    if graph.weights.is_qdq:
        # onnxruntime makes a Gemm of MatMul and Add with a bias of one dimension, and moves the quantisation across the
        # Reshape that this takes, to nodes that it then refuses (onnxruntime issue 25526; seen with 1.31.1).
        bias = bias[None, None]
    return graph.node("Add", [product, graph.initializer(f"{name}.bias", bias)], [name])


def embedding(graph: GraphBuilder, table: Float32Array, name: str) -> str:
    """Rows of ``table (vocab, hidden)`` by ``input_ids``; a tied head reads the same bytes where kernels can.

    Returns:
        The name of the output ``(batch, seq, hidden)``.
    """
    if graph.weights.is_static:
        table = pad_table(graph, table)
    if not (graph.weights.is_quantized and graph.weights.kernels.gathers_blocks):
        return graph.node("Gather", [graph.initializer(f"{name}.weight", table), graph_io.INPUT_IDS], [name])
    block_size = fitting_block_size(table.shape[1], graph.weights.head_block_size)
    quantized = quantize(table, _EMBEDDING_BITS, block_size)
    blocks, scales = _store_blocks(graph, name, quantized)
    # MatMulNBits wants (N, blocks, block), GatherBlockQuantized (N, K): one stored tensor, two views.
    rows = graph.node(
        "Reshape", [blocks, graph.initializer(f"{name}.shape", np.array(table.shape, np.int64))], [f"{name}.rows"]
    )
    return graph.contrib(
        "GatherBlockQuantized",
        [rows, graph_io.INPUT_IDS, scales],
        [name],
        bits=_EMBEDDING_BITS,
        block_size=block_size,
        gather_axis=0,
        quantize_axis=1,
    )


def tied_head(graph: GraphBuilder, x: str, table_shape: tuple[int, int], name: str, output: str) -> None:
    """Multiply with the embedding's own bytes.

    Args:
        graph: the graph, in which ``embedding`` has stored the table, in a form that the head can read.
        x: hidden states ``(batch, n, hidden)``.
        table_shape: ``(vocab, hidden)``.
        name: the name that ``embedding`` was given.
        output: the name of the product ``(batch, n, vocab)``.
    """
    if not graph.weights.is_quantized:
        graph.contrib("FusedMatMul", [x, f"{name}.weight"], [output], transB=1)
        return
    block_size = fitting_block_size(table_shape[1], graph.weights.head_block_size)
    graph.contrib(
        "MatMulNBits",
        [x, f"{name}.blocks", f"{name}.scales"],
        [output],
        K=table_shape[1],
        N=table_shape[0],
        bits=_EMBEDDING_BITS,
        block_size=block_size,
        accuracy_level=graph.weights.kernels.accuracy_level,
    )


def untied_head(graph: GraphBuilder, x: str, table: Float32Array, name: str, output: str) -> None:
    """Multiply with a table of the head's own.

    Args:
        graph: the graph.
        x: hidden states ``(batch, n, hidden)``.
        table: ``(vocab, hidden)``.
        name: prefix of the weights' names.
        output: the name of the product ``(batch, n, padded vocab)``; rows of padding give 0.
    """
    if not graph.weights.is_quantized:
        graph.contrib("FusedMatMul", [x, graph.initializer(f"{name}.weight", table)], [output], transB=1)
        return
    block_size = fitting_block_size(table.shape[1], graph.weights.head_block_size)
    quantized = quantize(table, _EMBEDDING_BITS, block_size)
    padded = pad_rows(quantized, graph.weights.padded_vocabulary(len(table)))
    _matmul_nbits(graph, [x, *_store_blocks(graph, name, padded)], output, padded)


def pad_table(graph: GraphBuilder, table: Float32Array) -> Float32Array:
    """``table (vocab, hidden)`` with rows of zeros up to the padded vocabulary; no token id reads them."""
    padding = graph.weights.padded_vocabulary(len(table)) - len(table)
    return np.pad(table, ((0, padding), (0, 0))) if padding else table


def gemm_head(graph: GraphBuilder, x: str, table: str, table_shape: tuple[int, int], output: str) -> str:
    """Multiply with a stored floating-point table, standard operators only; a tied head shares the embedding's.

    Args:
        graph: the graph.
        x: hidden states ``(1, n, hidden)``.
        table: the initializer ``(padded vocab, hidden)``.
        table_shape: its shape.
        output: the name of the product ``(1, n, padded vocab)``; rows of padding give 0.
    """
    vocab_size, hidden_size = table_shape
    rows = graph.node("Reshape", [x, graph.shape(-1, hidden_size)], [f"{output}.rows"])
    product = graph.node("Gemm", [rows, table], [f"{output}.product"], transB=1)
    return graph.node("Reshape", [product, graph.shape(1, -1, vocab_size)], [output])


def _store_blocks(graph: GraphBuilder, name: str, weight: QuantizedWeight) -> tuple[str, str]:
    return (
        graph.initializer(f"{name}.blocks", weight.blocks),
        graph.initializer(f"{name}.scales", weight.scales),
    )


def _matmul_nbits(graph: GraphBuilder, inputs: list[str], output: str, weight: QuantizedWeight) -> str:
    rows, blocks = weight.scales.shape
    return graph.contrib(
        "MatMulNBits",
        inputs,
        [output],
        K=blocks * weight.block_size,
        N=rows,
        bits=weight.bits,
        block_size=weight.block_size,
        accuracy_level=graph.weights.kernels.accuracy_level,
    )
