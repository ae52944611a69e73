"""Whether every graph of a bundle passes the self-test that a device will give it, on the CPU provider."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from edge_llm.engine.engine import Engine
from edge_llm.engine.loading import NEAR_TIE, runner_maker, self_test_distances
from export.console import say
from export.errors import ExportError
from export.verify import expect_greedy

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from edge_llm.bundle.manifest import Graph, Manifest


def settle_expectations(folder: Path, manifest: Manifest, differences: Mapping[str, float]) -> Manifest:
    """Replay the recorded tokens through every other target's shipped files, as a device will.

    A device refuses a graph to which they are unlikely. Coarser weights may rightly choose other tokens, as far as the
    logits were seen to differ on the text; then the target gets an expectation of its own. One that is further off was
    damaged after it had been judged, or answers otherwise token by token than it does by chunks.

    Args:
        folder: the bundle's files.
        manifest: names them, and holds the tokens that its first target generates.
        differences: by target, the largest difference of a logit from the float32 graph's, as quality.json has it;
            none is that graph itself.

    Returns:
        The manifest, with the expectations that targets have got.

    Raises:
        ExportError: naming the target that is too far off.
    """
    recorded, *others = manifest.graphs
    settled = [recorded]
    for graph in others:
        # The most that one candidate may have lost and the other one gained, in both graphs.
        explained = 2 * (differences.get(recorded.target, 0.0) + differences.get(graph.target, 0.0))
        settled.append(_settle(folder, manifest, graph, max(explained, NEAR_TIE)))
    return msgspec.structs.replace(manifest, graphs=tuple(settled))


def _settle(folder: Path, manifest: Manifest, graph: Graph, explained: float) -> Graph:
    runner = runner_maker(graph, folder / graph.file)(manifest.model, kv_dtype=graph.kv_dtype)
    expectation = manifest.expectation
    distances = self_test_distances(Engine(runner, manifest.prompt.stop_token_ids), expectation)
    for step, distance in enumerate(distances):
        # Not a number fails, too.
        if not distance < explained:
            raise ExportError(
                f"{graph.target} disagrees with the self-test recorded from {manifest.graphs[0].target}: the logit of "
                f"token {step}, {expectation.token_ids[step]}, is {distance:.2f} below its best one, and what was "
                f"measured on the text explains {explained:.2f}: no bundle was written; leave {graph.target} out, and "
                f"please report it"
            )
    if max(distances) < NEAR_TIE:
        return graph
    say(f"note: {graph.target} rightly generates other tokens than {manifest.graphs[0].target}, which are recorded too")
    own = expect_greedy(runner, expectation.prompt_token_ids)
    return msgspec.structs.replace(graph, expectation=own)
