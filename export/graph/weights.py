"""How weight matrices enter a graph: embedding, linear layers and the head, in int8, int4 or float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from edge_llm.bundle import graph_io
from export.quantize import BLOCK_SIZES, QuantizedWeight, fitting_block_size, quantize

if TYPE_CHECKING:
    from export.graph.builder import GraphBuilder
    from export.tensors import Float32Array

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
class WeightFormat:
    """How a target stores weight matrices.

    Attributes:
        target: the graph's name in the bundle, ``cpu-int8`` or ``cpu-fp32``.
        bits: 8, 4, or 32 for float32.
        block_size: weights of a layer that share a scale, where the matrix allows it (0 for float32).
        head_block_size: the same of the embedding and the head.
    """

    target: str
    bits: Literal[4, 8, 32]
    block_size: int
    head_block_size: int

    @property
    def is_quantized(self) -> bool:
        """Whether matrices are stored in blocks of integers."""
        return self.bits < 32


CPU_FP32: Final = WeightFormat("cpu-fp32", 32, 0, 0)


def cpu_int8(bits: Literal[4, 8] = 8, block_size: int = DEFAULT_BLOCK_SIZE) -> WeightFormat:
    """The ``cpu-int8`` target; with ``bits`` 4 its linear layers take half the space.

    Blocks smaller than the default are asked for because they are more exact, so the head has them, too.
    """
    assert block_size in BLOCK_SIZES
    head_block_size = block_size if block_size < DEFAULT_BLOCK_SIZE else max(block_size, _HEAD_BLOCK_SIZE)
    return WeightFormat("cpu-int8", bits, block_size, head_block_size)


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
    if graph.weights.is_quantized:
        block_size = fitting_block_size(weight.shape[1], graph.weights.block_size)
        quantized = quantize(weight, graph.weights.bits, block_size)
        inputs = [x, *_store_blocks(graph, name, quantized)]
        if bias is not None:
            inputs += ["", "", graph.initializer(f"{name}.bias", bias)]
        return _matmul_nbits(graph, inputs, name, quantized)
    product = f"{name}.product" if bias is not None else name
    graph.node("MatMul", [x, graph.initializer(f"{name}.weight", weight.T)], [product])
    if bias is None:
        return product
    return graph.node("Add", [product, graph.initializer(f"{name}.bias", bias)], [name])


def embedding(graph: GraphBuilder, table: Float32Array, name: str) -> str:
    """Rows of ``table (vocab, hidden)`` by ``input_ids``; ``tied_head`` reads the same bytes.

    Returns:
        The name of the output ``(batch, seq, hidden)``.
    """
    if not graph.weights.is_quantized:
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


def tied_head(graph: GraphBuilder, x: str, table_shape: tuple[int, int], name: str) -> None:
    """Logits from the embedding's own bytes.

    Args:
        graph: the graph, in which ``embedding`` has stored the table.
        x: hidden states ``(batch, n, hidden)``.
        table_shape: ``(vocab, hidden)``.
        name: the name that ``embedding`` was given.
    """
    if not graph.weights.is_quantized:
        graph.contrib("FusedMatMul", [x, f"{name}.weight"], [graph_io.LOGITS], transB=1)
        return
    block_size = fitting_block_size(table_shape[1], graph.weights.head_block_size)
    graph.contrib(
        "MatMulNBits",
        [x, f"{name}.blocks", f"{name}.scales"],
        [graph_io.LOGITS],
        K=table_shape[1],
        N=table_shape[0],
        bits=_EMBEDDING_BITS,
        block_size=block_size,
        accuracy_level=_ACCURACY_LEVEL,
    )


def untied_head(graph: GraphBuilder, x: str, table: Float32Array, name: str) -> None:
    """Logits from a head of its own, ``table (vocab, hidden)``; ``x`` is ``(batch, n, hidden)``."""
    if not graph.weights.is_quantized:
        graph.contrib("FusedMatMul", [x, graph.initializer(f"{name}.weight", table)], [graph_io.LOGITS], transB=1)
        return
    block_size = fitting_block_size(table.shape[1], graph.weights.head_block_size)
    quantized = quantize(table, _EMBEDDING_BITS, block_size)
    _matmul_nbits(graph, [x, *_store_blocks(graph, name, quantized)], graph_io.LOGITS, quantized)


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
        accuracy_level=_ACCURACY_LEVEL,
    )
