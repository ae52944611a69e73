"""From a bundle to an engine that is ready to run."""

from __future__ import annotations

import logging
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnxruntime as ort

from edge_llm.bundle.manifest import TOKENIZER_FILE
from edge_llm.bundle.prepare import prepared_graph
from edge_llm.config import cache_dir
from edge_llm.device.providers import ProviderChoice, choose_provider
from edge_llm.engine.engine import Engine
from edge_llm.engine.prompt import PromptRenderer
from edge_llm.engine.runner import Runner
from edge_llm.engine.sampler import SamplingParams
from edge_llm.engine.tokenizer import Tokenizer
from edge_llm.errors import BundleError, UnsupportedBundleError

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge_llm.bundle.manifest import Bundle, Graph
    from edge_llm.config import Config

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A bundle, ready to answer.

    Attributes:
        prepared: whether the graph is the device-local prepared copy.
        load_s: seconds from the opened bundle to here, without preparing.
    """

    bundle: Bundle
    engine: Engine
    tokenizer: Tokenizer
    renderer: PromptRenderer
    provider: ProviderChoice
    prepared: bool
    load_s: float


def load_model(bundle: Bundle, config: Config, on_state: Callable[[str], None] | None = None) -> LoadedModel:
    """Verify a bundle's files, prepare its graph, and load it.

    Args:
        bundle: an opened bundle.
        config: which graph, provider, threads and slots.
        on_state: told ``preparing`` and ``loading`` as they begin; preparing can take long on a small board.

    Raises:
        BundleError: a file is missing, damaged, or not for this runtime.
    """
    report = on_state or (lambda _state: None)
    manifest = bundle.manifest
    graph = manifest.graph(config.engine.target)
    _check_runtime(graph)
    provider = choose_provider(config.engine.providers)
    graph_path = None
    if config.engine.prepare and provider.name == "CPUExecutionProvider":
        report("preparing")
        try:
            graph_path = prepared_graph(bundle, graph.target, cache_dir(config))
        except BundleError as error:
            # A full disk must not keep the device silent: the bundle's own graph answers too, with more memory.
            _log.warning("no prepared copy, serving the bundle's own graph: %s", error)
    report("loading")
    started = time.monotonic()
    prepared = graph_path is not None
    if graph_path is None:
        graph_path = bundle.verified_path(graph.file)
        if graph.data_file is not None:
            bundle.verified_path(graph.data_file)
    tokenizer = Tokenizer.from_file(bundle.verified_path(TOKENIZER_FILE))
    if tokenizer.vocab_size > manifest.model.vocab_size:
        raise UnsupportedBundleError(
            f"tokenizer.json has {tokenizer.vocab_size} tokens, the model {manifest.model.vocab_size}: export it again"
        )
    runner = Runner(
        graph_path,
        manifest.model,
        slots=config.engine.slots,
        threads=config.engine.threads,
        providers=[provider.name],
        kv_dtype=graph.kv_dtype,
    )
    engine = Engine(runner, manifest.prompt.stop_token_ids, config.engine.prefill_chunk)
    renderer = PromptRenderer(manifest.prompt, tokenizer)
    return LoadedModel(bundle, engine, tokenizer, renderer, provider, prepared, time.monotonic() - started)


def self_test(model: LoadedModel) -> bool:
    """Generate the manifest's expectation greedily; True if the first token is the recorded one.

    Later tokens may differ on another processor where two logits nearly tie, so only the first one decides.
    """
    expectation = model.bundle.manifest.expectation
    tokens = model.engine.generate(expectation.prompt_token_ids, SamplingParams(), max_tokens=1)
    return next(iter(tokens), None) == expectation.token_ids[0]


def _check_runtime(graph: Graph) -> None:
    if _version(ort.__version__) < _version(graph.min_onnxruntime):
        raise UnsupportedBundleError(
            f"the {graph.target} graph needs onnxruntime {graph.min_onnxruntime} or newer, this is {ort.__version__}: "
            "upgrade onnxruntime"
        )


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])
