"""From a bundle to an engine that is ready to run."""

from __future__ import annotations

import functools
import itertools
import logging
import re
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import msgspec
import numpy as np
import onnxruntime as ort

from edge_llm.bundle.manifest import TOKENIZER_FILE
from edge_llm.bundle.prepare import CopyInUse, prepared_graph
from edge_llm.bundle.tensorrt_engines import Progress, TensorrtEngines
from edge_llm.config import cache_dir
from edge_llm.device.cpu import use_cores
from edge_llm.device.memory import check_memory, trim_memory
from edge_llm.device.providers import Candidate, ProviderChoice, candidates, check_placement, none_left
from edge_llm.device.session import CPU, TENSORRT, placement
from edge_llm.domain.domain import Domain
from edge_llm.engine.device_runner import DeviceRunner
from edge_llm.engine.engine import Engine
from edge_llm.engine.prompt import PromptRenderer
from edge_llm.engine.runner import ModelRunner, Runner
from edge_llm.engine.sampler import Sampler, SamplingParams
from edge_llm.engine.static_runner import StaticPaths, StaticRunner
from edge_llm.engine.tokenizer import Tokenizer
from edge_llm.errors import BundleError, ConfigError, ProviderError, UnsupportedBundleError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from edge_llm.bundle.manifest import Bundle, Expectation, Graph, PromptTemplate
    from edge_llm.config import Config

_log = logging.getLogger(__name__)

# Logits of one bundle differ by a few hundredths between processors; garbage differs by whole units.
NEAR_TIE: Final = 0.25
# Of the self-test's decoding. The first might still find what its binding was made with.
_TESTED_STEPS: Final = 2
# Interpreter, libraries and buffers: 42 MB with a small bundle, 60 MB with a vocabulary of 50,000 (docs/benchmarks.md).
_PROGRAM_BYTES: Final = 64_000_000


@dataclass(frozen=True)
class LoadedModel:
    """A bundle, ready to answer.

    Attributes:
        provider: what runs it, and which graph.
        prepared: whether the graph is the device-local prepared copy.
        load_s: seconds to load the tokenizer and the graph, without preparing.
        domain: what a domain bundle may say and do; None for a model that just writes.
        fall_back: loads the model on the next provider that serves, for when this one fails; None on the last one.
        copy_in_use: keeps the prepared copy on the disk.
    """

    bundle: Bundle
    engine: Engine
    tokenizer: Tokenizer
    renderer: PromptRenderer
    provider: ProviderChoice
    prepared: bool
    load_s: float
    domain: Domain | None = None
    fall_back: Callable[[], LoadedModel] | None = None
    copy_in_use: CopyInUse | None = None


def load_model(bundle: Bundle, config: Config, on_state: Callable[..., None] | None = None) -> LoadedModel:
    """Verify a bundle's files, prepare its graph, load it, and see that it answers as it did at export.

    Args:
        bundle: an opened bundle.
        config: which graph, provider, threads and slots.
        on_state: told ``preparing`` and ``loading`` as they begin; preparing can take long on a small board. While a
            provider compiles, told every few seconds with ``provider``, ``elapsed_s``, ``engines`` and ``graphs``.

    Raises:
        MemoryPlanError: the machine cannot hold it.
        BundleError: a file is missing, damaged, or not for this runtime, or the answer is wrong.
        ConfigError: a system prompt is set, and the bundle's template has no place for one.
    """
    use_cores(config.engine.affinity)
    refused: dict[str, str] = {}
    remaining = candidates(config.engine, bundle.manifest, refused)
    return _load_first(bundle, config, remaining, refused, on_state or _report_nothing)


def _load_first(
    bundle: Bundle,
    config: Config,
    remaining: Iterator[Candidate],
    refused: dict[str, str],
    report: Callable[..., None],
) -> LoadedModel:
    """The model on the first of ``remaining`` that serves; those before it are entered in ``refused``."""
    for candidate in remaining:
        name = candidate.provider.name
        try:
            _check_runtime(candidate.graph)
            model = _load_candidate(bundle, config, candidate, report)
        except ProviderError as error:
            # The first reason is that of the graph which suits the provider best.
            refused.setdefault(name, str(error))
            _log.warning("%s does not serve: %s", candidate, error)
            continue
        refused.pop(name, None)
        choice = ProviderChoice(name, candidate.graph.target, dict(refused))
        if name == config.engine.providers[-1]:
            return replace(model, provider=choice)
        # Another graph on the same device would fail as well, and an engine might have to be built for it first.
        others = (candidate for candidate in remaining if candidate.provider.name != name)
        fall_back = functools.partial(_load_next, bundle, config, others, refused, name)
        return replace(model, provider=choice, fall_back=fall_back)
    raise none_left(refused, bundle.manifest)


def _load_next(
    bundle: Bundle, config: Config, others: Iterator[Candidate], refused: dict[str, str], failed: str
) -> LoadedModel:
    """The model on the next provider, after one that served has failed."""
    refused[failed] = "it failed while it was serving"
    return _load_first(bundle, config, others, refused, _report_nothing)


def _load_candidate(bundle: Bundle, config: Config, candidate: Candidate, report: Callable[..., None]) -> LoadedModel:
    """The model on one provider, seen to answer right. Raises ``ProviderError`` if it cannot be."""
    graph = candidate.graph
    check_memory(memory_needs(bundle, config, graph, candidate.provider.name))
    # A static form is for a provider that compiles it; the processor runs it to check it.
    if config.engine.prepare and candidate.provider.name == CPU and not graph.is_static:
        report("preparing")
        try:
            graph_path = prepared_graph(bundle, graph.target, cache_dir(config))
        except ProviderError:
            # It crashed ONNX Runtime in another process, and would do so in this one.
            raise
        except BundleError as error:
            # A full disk must not keep the device silent: the bundle's own graph answers too, with more memory.
            _log.warning("no prepared copy, serving the bundle's own graph: %s", error)
        else:
            report("loading")
            copy_in_use = CopyInUse(graph_path)
            model = replace(_load(bundle, config, candidate, graph_path, prepared=True), copy_in_use=copy_in_use)
            if _passes(model, candidate):
                return model
            _log.warning("the prepared copy answers wrongly, serving the bundle's own graph: please report this")
    report("loading")
    graph_path, *_ = (bundle.verified_path(name) for name in graph.files)
    if candidate.provider.name == TENSORRT:
        model = _load_compiled(bundle, config, candidate, graph_path, report)
    else:
        model = _load(bundle, config, candidate, graph_path, prepared=False)
    if not _passes(model, candidate):
        raise ProviderError(
            f"{candidate} does not generate the token recorded at export: it would answer wrongly here. Try another "
            "onnxruntime"
        )
    return model


def _load_compiled(
    bundle: Bundle, config: Config, candidate: Candidate, graph_path: Path, report: Callable[..., None]
) -> LoadedModel:
    """On engines that are kept, or built now; those that cannot be loaded any more are built anew, once."""
    engines = TensorrtEngines(bundle, candidate.graph, candidate.provider, cache_dir(config))
    candidate = candidate._replace(provider=engines.provider)

    def prepare() -> bool:
        built = engines.prepare(lambda progress: _report_progress(report, candidate, progress))
        if built:
            report("loading")
        return built

    built = prepare()
    try:
        return _load(bundle, config, candidate, graph_path, prepared=False)
    except ProviderError as error:
        if built or not engines.discard():
            raise
        _log.warning("the kept engines are built anew, as after an upgrade of TensorRT: %s", error)
    prepare()
    return _load(bundle, config, candidate, graph_path, prepared=False)


def _report_progress(report: Callable[..., None], candidate: Candidate, progress: Progress) -> None:
    report("preparing", provider=candidate.provider.name, **progress._asdict())


def _report_nothing(_state: str, **_detail: object) -> None:
    """Nobody waits."""


def memory_needs(bundle: Bundle, config: Config, graph: Graph, provider: str = CPU) -> dict[str, int]:
    """Bytes that a graph will take once every slot and the prefix cache are full, by what they are for."""
    dims, settings = bundle.manifest.model, config.engine
    # The processor's pages are taken as they are first written; a device takes the graph's whole cache at once.
    positions = min(dims.max_seq_len, settings.context or dims.max_seq_len) if provider == CPU else dims.max_seq_len
    # Each of a static form's two sessions has the weights of its own.
    copies = 2 if graph.is_static else 1
    per_token = 2 * dims.num_layers * dims.num_kv_heads * dims.head_dim * np.dtype(graph.kv_dtype).itemsize
    return {
        "weights": copies * bundle.entry(graph.data_file or graph.file).size_bytes,
        f"{settings.slots} slots of {positions} tokens": settings.slots * positions * per_token,
        "prefix cache": config.cache.max_bytes if config.cache.prefix else 0,
        "program": _PROGRAM_BYTES,
    }


def _passes(model: LoadedModel, candidate: Candidate) -> bool:
    """``self_test``; raises ``ProviderError`` if the graph cannot even be run."""
    try:
        return self_test(model)
    except Exception as error:  # ONNX Runtime raises bare RuntimeErrors, and a wrong shape a ValueError
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ProviderError(
            f"{candidate} cannot be run, so graph and manifest may not belong together: {reason}"
        ) from None


def self_test(model: LoadedModel) -> bool:
    """Whether what was recorded for its graph comes out: the first tokens are the most likely ones, or nearly so.

    Processors add in different orders, so two close logits may swap; a wrong kernel or a damaged weight is far off.
    """
    manifest = model.bundle.manifest
    expectation = manifest.graph(model.provider.target).expectation or manifest.expectation
    return all(distance < NEAR_TIE for distance in self_test_distances(model.engine, expectation))


def self_test_distances(engine: Engine, expectation: Expectation) -> list[float]:
    """How far each tested token's logit is below the best one: the first recorded token, and those of a few steps.

    Args:
        engine: with a free slot.
        expectation: whose tokens go in, whatever the engine holds to be right.
    """
    state = engine.start(expectation.prompt_token_ids, SamplingParams(), max_tokens=1)
    while not state.prefilled:
        engine.prefill(state)
    distances = [_distance(engine.runner.logits(0), expectation.token_ids[0])]
    steps = min(_TESTED_STEPS, engine.max_seq_len - state.cached_len)
    # The recorded tokens go in, whatever was sampled: a domain's grammar or a stop token may have ended the answer.
    for token_id, following in itertools.pairwise(expectation.token_ids[: 1 + steps]):
        engine.runner.decode(state.slot, [token_id], [state.cached_len])
        state.cached_len += 1
        distances.append(_distance(engine.runner.logits(0), following))
    engine.release(state)
    return distances


def _distance(logits: NDArray[np.float32], token_id: int) -> float:
    return float(logits.max() - logits[token_id])


def _load(bundle: Bundle, config: Config, candidate: Candidate, graph_path: Path, *, prepared: bool) -> LoadedModel:
    started = time.monotonic()
    manifest = bundle.manifest
    tokenizer = Tokenizer.from_file(bundle.verified_path(TOKENIZER_FILE))
    if tokenizer.vocab_size > manifest.model.vocab_size:
        raise UnsupportedBundleError(
            f"tokenizer.json has {tokenizer.vocab_size} tokens, the model {manifest.model.vocab_size}: export it again"
        )
    runner = runner_maker(candidate.graph, graph_path, candidate.provider.name)(
        manifest.model,
        slots=config.engine.slots,
        threads=config.engine.threads,
        provider=candidate.provider,
        kv_dtype=candidate.graph.kv_dtype,
        context=config.engine.context,
    )
    for session in runner.sessions:
        check_placement(placement(session), candidate.provider.name)
    domain = Domain.from_bundle(bundle, tokenizer)
    make_sampler = Sampler if domain is None else domain.sampler
    engine = Engine(runner, manifest.prompt.stop_token_ids, config.engine.prefill_chunk, make_sampler)
    renderer = PromptRenderer(_template(manifest.prompt, config), tokenizer)
    trim_memory()
    choice = ProviderChoice(candidate.provider.name, candidate.graph.target)
    return LoadedModel(bundle, engine, tokenizer, renderer, choice, prepared, time.monotonic() - started, domain)


def runner_maker(graph: Graph, graph_path: Path, provider: str = CPU) -> Callable[..., ModelRunner]:
    """What runs a graph of that form: it is called with the model's shape and the settings of ``Runner``.

    Args:
        graph: the manifest's entry.
        graph_path: its file, or the prepared copy; what else a static form has lies beside it.
        provider: what will run it.
    """
    if graph.prefill_file is None:
        return functools.partial(Runner if provider == CPU else DeviceRunner, graph_path)
    prefill_path = graph_path.with_name(graph.prefill_file.rpartition("/")[2])
    return functools.partial(StaticRunner, StaticPaths(graph_path, prefill_path))


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
        raise ProviderError(
            f"the {graph.target} graph needs onnxruntime {graph.min_onnxruntime} or newer, this is {ort.__version__}: "
            "upgrade onnxruntime"
        )


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])
