"""From a bundle to an engine that is ready to run."""

from __future__ import annotations

import logging
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec
import onnxruntime as ort

from edge_llm.bundle.manifest import TOKENIZER_FILE
from edge_llm.bundle.prepare import prepared_graph
from edge_llm.config import cache_dir
from edge_llm.device.memory import trim_memory
from edge_llm.device.providers import ProviderChoice, choose_provider
from edge_llm.domain.domain import Domain
from edge_llm.engine.engine import Engine
from edge_llm.engine.prompt import PromptRenderer
from edge_llm.engine.runner import Runner
from edge_llm.engine.sampler import Sampler, SamplingParams
from edge_llm.engine.tokenizer import Tokenizer
from edge_llm.errors import BundleError, BundleIntegrityError, ConfigError, UnsupportedBundleError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edge_llm.bundle.manifest import Bundle, Graph, PromptTemplate
    from edge_llm.config import Config

_log = logging.getLogger(__name__)

# Logits of one bundle differ by a few hundredths between processors; garbage differs by whole units.
_NEAR_TIE: Final = 0.25


@dataclass(frozen=True)
class LoadedModel:
    """A bundle, ready to answer.

    Attributes:
        prepared: whether the graph is the device-local prepared copy.
        load_s: seconds to load the tokenizer and the graph, without preparing.
        domain: what a domain bundle may say and do; None for a model that just writes.
    """

    bundle: Bundle
    engine: Engine
    tokenizer: Tokenizer
    renderer: PromptRenderer
    provider: ProviderChoice
    prepared: bool
    load_s: float
    domain: Domain | None = None


def load_model(bundle: Bundle, config: Config, on_state: Callable[[str], None] | None = None) -> LoadedModel:
    """Verify a bundle's files, prepare its graph, load it, and see that it answers as it did at export.

    Args:
        bundle: an opened bundle.
        config: which graph, provider, threads and slots.
        on_state: told ``preparing`` and ``loading`` as they begin; preparing can take long on a small board.

    Raises:
        BundleError: a file is missing, damaged, or not for this runtime, or the answer is wrong.
        ConfigError: a system prompt is set, and the bundle's template has no place for one.
    """
    report = on_state or (lambda _state: None)
    graph = bundle.manifest.graph(config.engine.target)
    _check_runtime(graph)
    provider = choose_provider(config.engine.providers)
    if config.engine.prepare and provider.name == "CPUExecutionProvider":
        report("preparing")
        try:
            graph_path = prepared_graph(bundle, graph.target, cache_dir(config))
        except BundleError as error:
            # A full disk must not keep the device silent: the bundle's own graph answers too, with more memory.
            _log.warning("no prepared copy, serving the bundle's own graph: %s", error)
        else:
            report("loading")
            model = _load(bundle, config, provider, graph_path, prepared=True)
            if self_test(model):
                return model
            _log.warning("the prepared copy answers wrongly, serving the bundle's own graph: please report this")
    report("loading")
    graph_path = bundle.verified_path(graph.file)
    if graph.data_file is not None:
        bundle.verified_path(graph.data_file)
    model = _load(bundle, config, provider, graph_path, prepared=False)
    if not self_test(model):
        raise BundleIntegrityError(
            f"{graph.target} on {provider.name} does not generate the token recorded at export: it would answer "
            "wrongly here. Try another engine.target or onnxruntime"
        )
    return model


def self_test(model: LoadedModel) -> bool:
    """Whether the manifest's expectation comes out: its first token is the most likely one, or nearly so.

    Processors add in different orders, so two close logits may swap; a wrong kernel or a damaged weight is far off.
    """
    expectation = model.bundle.manifest.expectation
    engine = model.engine
    state = engine.start(expectation.prompt_token_ids, SamplingParams(), max_tokens=1)
    while not state.prefilled:
        engine.prefill(state)
    engine.release(state)
    logits = engine.runner.logits(0)
    return bool(logits.max() - logits[expectation.token_ids[0]] < _NEAR_TIE)


def _load(bundle: Bundle, config: Config, provider: ProviderChoice, graph_path: Path, *, prepared: bool) -> LoadedModel:
    started = time.monotonic()
    manifest = bundle.manifest
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
        kv_dtype=manifest.graph(config.engine.target).kv_dtype,
    )
    domain = Domain.from_bundle(bundle, tokenizer)
    make_sampler = Sampler if domain is None else domain.sampler
    engine = Engine(runner, manifest.prompt.stop_token_ids, config.engine.prefill_chunk, make_sampler)
    renderer = PromptRenderer(_template(manifest.prompt, config), tokenizer)
    trim_memory()
    return LoadedModel(bundle, engine, tokenizer, renderer, provider, prepared, time.monotonic() - started, domain)


def _template(template: PromptTemplate, config: Config) -> PromptTemplate:
    """The bundle's template, with the system prompt that is configured here."""
    system_prompt = config.serving.system_prompt
    if system_prompt is None:
        return template
    if template.system is None:
        raise ConfigError("serving.system_prompt: this bundle's template has no system message; leave it out")
    return msgspec.structs.replace(template, default_system=system_prompt)


def _check_runtime(graph: Graph) -> None:
    if _version(ort.__version__) < _version(graph.min_onnxruntime):
        raise UnsupportedBundleError(
            f"the {graph.target} graph needs onnxruntime {graph.min_onnxruntime} or newer, this is {ort.__version__}: "
            "upgrade onnxruntime"
        )


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])
