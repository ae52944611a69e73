"""The end of every graph: the rows that were asked for, their logits, the most likely tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge_llm.bundle import graph_io
from export.graph.weights import tied_head, untied_head

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
    if tied:
        vocab_size, hidden_size = tensors.shapes[f"{embedding_name}.weight"]
        tied_head(graph, rows, (vocab_size, hidden_size), embedding_name)
    else:
        untied_head(graph, rows, tensors.read("lm_head.weight"), "lm_head")
    graph.node("ArgMax", [graph_io.LOGITS], [graph_io.NEXT_TOKEN_IDS], axis=-1, keepdims=0)
