"""How long a client waits for a domain bundle's answer, over MQTT, with every cache off."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks.ratios import percentile
from benchmarks.serving import BenchClient, Daemon
from edge_llm.bundle.prepare import prepared_graph
from edge_llm.local_broker import local_broker

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edge_llm.bundle.manifest import Bundle

_LATENCY_QUERIES: Final = 200
_COLD: Final = ("cache.prefix=false", "cache.responses=false", "prefetch.popularity=false")


def measure_latency(bundle: Bundle, cache_dir: Path, texts: Sequence[str]) -> dict[str, Any]:
    """First text and whole answer as a client sees them, every cache off."""
    prepared_graph(bundle, bundle.manifest.graphs[0].target, cache_dir)
    first_ms, whole_ms = [], []
    step = max(1, len(texts) // _LATENCY_QUERIES)
    with tempfile.TemporaryDirectory() as name, local_broker(Path(name)) as broker:
        client = BenchClient(broker.port)
        daemon = Daemon(bundle, cache_dir, broker.port, Path(name) / "daemon.log", _COLD)
        try:
            client.wait_online(daemon, daemon.start())
            for number, text in enumerate(texts[::step]):
                (answer,) = client.ask(daemon, [{"id": f"q{number}", "text": text, "cache": "bypass"}])
                assert answer.final is not None
                first = answer.deltas[0] if answer.deltas else answer.final
                first_ms.append((first.at - answer.published_at) * 1e3)
                whole_ms.append((answer.final.at - answer.published_at) * 1e3)
        finally:
            daemon.stop()
            client.close()
    return {
        "queries": len(first_ms),
        **{f"first_text_ms_p{p}": round(percentile(first_ms, p), 2) for p in (50, 95, 99)},
        **{f"whole_answer_ms_p{p}": round(percentile(whole_ms, p), 2) for p in (50, 95, 99)},
    }
