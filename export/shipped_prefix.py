"""``--ship-prefix``: the keys and values of what every prompt begins with, computed by the engine that will serve."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from edge_llm.bundle.manifest import TOKENIZER_FILE
from edge_llm.bundle.prefix_file import PREFIX_FILE, PrefixKV, shipped_prefix_key, write_prefix_file
from edge_llm.engine.engine import MIN_CHUNK, Engine
from edge_llm.engine.loading import runner_maker
from edge_llm.engine.prompt import PromptRenderer
from edge_llm.engine.sampler import SamplingParams
from edge_llm.engine.tokenizer import Tokenizer
from export.console import say
from export.package import list_files

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from edge_llm.bundle.manifest import Manifest


def add_prefix_files(folder: Path, manifest: Manifest) -> Manifest:
    """Write a prefix file for every target of a staged bundle, if its prompts have a head in common.

    Args:
        folder: the bundle's files but for the manifest.
        manifest: names them all, with their hashes.

    Returns:
        The manifest that names the prefix files, too; the same one if there is nothing to ship.

    Raises:
        OSError: a file cannot be written.
    """
    tokenizer = Tokenizer.from_file(folder / TOKENIZER_FILE)
    token_ids = PromptRenderer(manifest.prompt, tokenizer).shared_prefix()
    context = manifest.model.max_seq_len
    # A single token would be computed by another kernel than the engine's prompts are.
    if len(token_ids) < MIN_CHUNK:
        say("note: the prompts of this template have no head in common, so no prefix is shipped")
        return manifest
    if len(token_ids) >= context:
        say(f"note: the prompts' common head has {len(token_ids)} tokens, the context {context}: no prefix is shipped")
        return manifest
    graphs = []
    for graph in manifest.graphs:
        runner = runner_maker(graph, folder / graph.file)(manifest.model, kv_dtype=graph.kv_dtype)
        name = f"graphs/{graph.target}/{PREFIX_FILE}"
        prefix = compute_prefix(Engine(runner, manifest.prompt.stop_token_ids), token_ids)
        write_prefix_file(folder / name, prefix, shipped_prefix_key(manifest, graph.target))
        graphs.append(msgspec.structs.replace(graph, prefix_file=name))
    files = list_files(folder, [graph.prefix_file for graph in graphs if graph.prefix_file is not None])
    return msgspec.structs.replace(manifest, graphs=tuple(graphs), files=manifest.files + files)


def compute_prefix(engine: Engine, token_ids: Sequence[int]) -> PrefixKV:
    """What the engine's cache holds after a prefill of ``token_ids``, at least ``MIN_CHUNK`` of them."""
    state = engine.start(token_ids, SamplingParams(), max_tokens=1)
    while not state.prefilled:
        engine.prefill(state)
    kv = engine.runner.cache.read_rows(state.slot, 0, len(token_ids))
    engine.release(state)
    return PrefixKV(tuple(token_ids), kv)
