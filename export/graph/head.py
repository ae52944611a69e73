"""The end of every graph: the rows that were asked for, their logits, the most likely tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto

from edge_llm.bundle import graph_io
from export.graph.weights import gemm_head, pad_table, tied_head, untied_head

if TYPE_CHECKING:
    from export.graph.builder import GraphBuilder
    from export.tensors import Tensors


def head(graph: GraphBuilder, hidden: str, tensors: Tensors, embedding_name: str, *, tied: bool) -> None:
    """Logits of the rows in ``logit_indices`` and their arg max.

    Args:
        graph: the graph.
        hidden: normalised hidden states ``(batch, seq, hidden)``.
        tensors: the checkpoint.
        embedding_name: the embedding's name, in the checkpoint (plus ``.weight``) and in the graph.
        tied: whether the head is the embedding, or ``lm_head.weight``.
    """
    rows = graph.node("Gather", [hidden, graph_io.LOGIT_INDICES], ["head.rows"], axis=1)
    vocab_size, hidden_size = tensors.shapes[f"{embedding_name}.weight"]
    is_padded = graph.weights.padded_vocabulary(vocab_size) != vocab_size
    is_final = graph.weights.float_type == "float32" and not is_padded
    scores = graph_io.LOGITS if is_final else "head.scores"
    if graph.weights.is_static:
        table_name = f"{embedding_name}.weight"
        if not tied:
            table_name = graph.initializer("lm_head.weight", pad_table(graph, tensors.read("lm_head.weight")))
        gemm_head(graph, rows, table_name, (graph.weights.padded_vocabulary(vocab_size), hidden_size), scores)
    elif tied and graph.weights.kernels.gathers_blocks:
        tied_head(graph, rows, (vocab_size, hidden_size), embedding_name, scores)
    else:
        table = tensors.read(f"{embedding_name}.weight" if tied else "lm_head.weight")
        untied_head(graph, rows, table, "lm_head", scores)
    if is_padded:
        scores = _without_padding(graph, scores, vocab_size)
    if not is_final:
        graph.node("Cast", [scores], [graph_io.LOGITS], to=TensorProto.FLOAT)
    graph.node("ArgMax", [graph_io.LOGITS], [graph_io.NEXT_TOKEN_IDS], axis=-1, keepdims=0)


def _without_padding(graph: GraphBuilder, scores: str, vocab_size: int) -> str:
    """The logits of real tokens.

    Cut off before the arg max, the padding cannot win. A mask of -inf would be one more pass over all logits, since
    they are cut for the output anyway.
    """
    values = {"start": 0, "end": vocab_size, "axis": -1}
    bounds = [graph.initializer(f"head.{name}", np.array([value], np.int64)) for name, value in values.items()]
    return graph.node("Slice", [scores, *bounds], ["head.unpadded"])
