"""Which ONNX Runtime execution providers are tried, in which order, and how one proves that it really serves."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

import onnxruntime as ort

from edge_llm.device.session import CPU, Provider
from edge_llm.errors import ManifestError, ProviderError, UnsupportedBundleError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from edge_llm.bundle.manifest import Graph, Manifest
    from edge_llm.config import EngineConfig
    from edge_llm.device.session import Placement

_NAMED_NODES: Final = 3


@dataclass(frozen=True)
class ProviderChoice:
    """The provider in use, its graph, and a reason for each one refused before it."""

    name: str
    target: str
    refused: dict[str, str] = field(default_factory=dict)


class Candidate(NamedTuple):
    """A provider with a graph that it might run."""

    provider: Provider
    graph: Graph

    def __str__(self) -> str:
        return f"the {self.graph.target} graph on {self.provider.name}"


def candidates(
    config: EngineConfig, manifest: Manifest, refused: dict[str, str], available: Sequence[str] | None = None
) -> Iterator[Candidate]:
    """What to try, in order; a provider that cannot be tried at all is entered in ``refused`` when its turn comes.

    Args:
        config: the providers, their graphs and options.
        manifest: the bundle's.
        refused: provider names and reasons.
        available: the providers that there are; None asks this machine's onnxruntime.

    Raises:
        ManifestError: ``config.target`` names a graph that the bundle lacks.
    """
    if config.target is not None:
        manifest.graph(config.target)
    if available is None:
        available = ort.get_available_providers()
    there = {graph.target: graph for graph in manifest.graphs}
    for provider in config.providers:
        if provider not in available:
            refused[provider] = f"onnxruntime {ort.__version__} was built without it"
            continue
        wanted = config.targets.get(provider, ()) if config.target is None else (config.target,)
        graphs = [there[target] for target in wanted if target in there]
        if not graphs:
            refused[provider] = f"the bundle has no graph for it ({' or '.join(wanted) or 'engine.targets names none'})"
        for graph in graphs:
            yield Candidate(Provider(provider, _options(provider, config)), graph)


def cpu_graph(config: EngineConfig, manifest: Manifest) -> Graph:
    """The graph that the processor would run. Raises ``ManifestError`` if the bundle has none."""
    if config.target is not None:
        return manifest.graph(config.target)
    there = [graph for target in config.targets.get(CPU, ()) for graph in manifest.graphs if graph.target == target]
    return there[0] if there else manifest.graph("cpu-int8")


def none_left(refused: dict[str, str], manifest: Manifest) -> UnsupportedBundleError | ManifestError:
    """The error that says why no provider serves."""
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
    available = ", ".join(ort.get_available_providers())
    if len(refused) == 1 and "no graph" in reasons:
        return ManifestError(f"{reasons}. It has: {', '.join(graph.target for graph in manifest.graphs)}")
    return UnsupportedBundleError(
        f"no execution provider can serve this bundle. {reasons}. onnxruntime {ort.__version__} has: {available}. Set "
        "engine.providers, or install another onnxruntime"
    )


def check_placement(placement: Placement, provider: str) -> None:
    """See that the provider runs the graph, and not another one in its place.

    ONNX Runtime only warns when a provider's library cannot be loaded, and when it leaves nodes to the processor.

    Raises:
        ProviderError: saying what runs where.
    """
    if provider not in placement.providers:
        raise ProviderError(
            f"onnxruntime could not load it (a library of CUDA or TensorRT is missing or of another version), and used "
            f"{', '.join(placement.providers)} instead"
        )
    if provider == CPU or placement.nodes is None:
        return
    elsewhere = [node for node in placement.nodes if node.provider != provider]
    if elsewhere:
        kinds = Counter(f"{node.op_type} on {node.provider}" for node in elsewhere).most_common(_NAMED_NODES)
        named = ", ".join(f"{count} {kind}" for kind, count in kinds)
        raise ProviderError(f"{len(elsewhere)} of {len(placement.nodes)} nodes would run elsewhere: {named}")


def _options(provider: str, config: EngineConfig) -> dict[str, str]:
    """Options as ONNX Runtime takes them, all of them text."""
    options = config.provider_options.get(provider, {})
    return {name: str(int(value)) if isinstance(value, bool) else str(value) for name, value in options.items()}
