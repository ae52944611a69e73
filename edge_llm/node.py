"""One node: the gateway, and the model that answers behind it, which may give way to another while queries come."""

from __future__ import annotations

import gc
import logging
import math
import platform
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnxruntime as ort

from edge_llm import __version__
from edge_llm.device.memory import trim_memory
from edge_llm.engine.loading import LoadedModel, load_model
from edge_llm.mqtt.feedback import FeedbackRecorder
from edge_llm.serving.caches import Caches, open_caches
from edge_llm.serving.failover import Failover
from edge_llm.serving.scheduler import Scheduler
from edge_llm.serving.switchboard import Switchboard

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge_llm.bundle.manifest import Bundle
    from edge_llm.bundle.store import Health
    from edge_llm.cache.erasure import Erasure
    from edge_llm.config import Config
    from edge_llm.domain.schema import DomainSchema
    from edge_llm.metrics import Metrics
    from edge_llm.mqtt.gateway import Gateway
    from edge_llm.notify import Heartbeat

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Served:
    """A model that answers queries, with its thread and what is remembered for it."""

    model: LoadedModel
    scheduler: Scheduler
    caches: Caches

    @property
    def bundle(self) -> Bundle:
        """What is served."""
        return self.model.bundle


class Node:
    """Loads bundles and lets them answer. One thread at a time changes what is served; the rest is thread-safe.

    Args:
        config: the settings.
        gateway: where queries come from; started and closed by its owner.
        metrics: what is counted.
        report: told each state that the node comes to, the bundle it concerns, and what is known of the progress.

    Attributes:
        served: what answers new queries; None before the first one, and between two that do not fit side by side.
    """

    def __init__(self, config: Config, gateway: Gateway, metrics: Metrics, report: Callable[..., None]) -> None:
        self._config = config
        self._gateway = gateway
        self._metrics = metrics
        self._report_to = report
        self._closing = False
        self._switchboard = Switchboard()
        self._caches: tuple[Caches, ...] = ()
        self._lock = threading.Lock()
        self._model: LoadedModel | None = None
        self._update: dict[str, Any] | None = None
        self.served: Served | None = None

    def load(self, bundle: Bundle, *, beside: bool = False) -> LoadedModel:
        """Load a bundle and have it answer its health prompt.

        Args:
            bundle: opened.
            beside: another one serves meanwhile, so the state is not this one's.

        Raises:
            BundleError, MemoryPlanError, ConfigError: as ``load_model`` does.
        """
        on_state = None if beside else (lambda state, **detail: self._report(state, bundle, **detail))
        return load_model(bundle, self._config, on_state=on_state)

    def start(self, model: LoadedModel) -> Served | None:
        """Let a model answer every query that comes from now on. ``announce`` tells of it, once it is recorded.

        Args:
            model: loaded.

        Returns:
            What did so before, if anything did: it finishes what it has accepted, and is to be retired.
        """
        served = self._serve(model)
        before, self.served = self.served, served
        if before is not None:
            # The heat is told by the new one from here on.
            before.caches.power.on_change = lambda _level: None
        self._switchboard.put(served.scheduler)
        recorder = None if served.caches.feedback is None else FeedbackRecorder(served.caches.feedback)
        self._gateway.bind(self._switchboard, served.bundle.manifest.generation, recorder)
        self._model = model
        return before

    def announce(self, update: dict[str, Any] | None = None) -> None:
        """Tell in ``info`` and the status what has been started.

        Args:
            update: what ``info`` says of the activation that brought it; None leaves what it says.
        """
        assert self._model is not None
        self._update = update or self._update
        self._publish(self._model)
        self._gateway.set_state("online", bundle=self._model.bundle.manifest.name)
        _log.info("online", extra=self._online(self._model))

    def retire(self, served: Served, hurry: threading.Event) -> None:
        """Wait until all that was accepted is answered, or ``hurry`` is set, and free what it took."""
        served.scheduler.drain(math.inf, hurry)
        self._switchboard.drop(served.scheduler)
        served.caches.close()
        with self._lock:
            self._caches = tuple(caches for caches in self._caches if caches is not served.caches)
        if self.served is served:
            self.served = self._model = None
        # The keys and values at once: a gauge may refer to the tree until the next one is there.
        served.caches.reuse.forget()

    def pause(self, next_bundle: Bundle, hurry: threading.Event) -> None:
        """Refuse queries, answer the accepted ones, and have nothing loaded: the machine holds one model only."""
        assert self.served is not None
        self._report("draining", self.served.bundle)
        self.retire(self.served, hurry)
        self._report("loading", next_bundle)

    def set_update(self, update: dict[str, Any]) -> None:
        """Say in ``info`` how the last activation of a bundle ended."""
        self._update = update
        if self._model is not None:
            self._publish(self._model)

    def forget(self, erasure: Erasure) -> None:
        """Drop what some users have said and been told."""
        self._gateway.forget(erasure)
        self._switchboard.forget(erasure)
        with self._lock:
            every = self._caches
        for caches in every:
            caches.forget_users()

    @property
    def heartbeats(self) -> dict[str, Heartbeat]:
        """Of every thread that must move."""
        return {"mqtt-link": self._gateway.link.heartbeat, **self._switchboard.heartbeats}

    def drain(self, timeout_s: float, hurry: threading.Event) -> bool:
        """The end: refuse new queries, finish what was accepted. False if not everything was in time."""
        with self._lock:
            self._closing = True
            self._gateway.set_state("draining")
        return self._switchboard.drain(timeout_s, hurry)

    def close(self) -> None:
        """Write what the caches have still to write."""
        with self._lock:
            every = self._caches
        for caches in every:
            caches.close()

    def _report(self, state: str, bundle: Bundle, **detail: Any) -> None:
        with self._lock:
            if not self._closing:
                self._report_to(state, bundle, **detail)

    def _serve(self, model: LoadedModel) -> Served:
        config = self._config
        caches = open_caches(model, config, self._metrics)
        with self._lock:
            self._caches = (*self._caches, caches)
        if model.domain is not None:
            model.domain.values = self._gateway.state_values
        scheduler = Scheduler(
            model.engine,
            model.tokenizer,
            model.renderer,
            model.bundle.manifest.generation,
            config.serving,
            caches=caches,
            domain=model.domain,
        )
        caches.power.on_change = self._gateway.set_power
        # Not by way of the caches: a gauge stays, and would hold the engine.
        power = caches.power
        self._metrics.gauge("temperature_c", lambda: power.temperature_c)
        for name in ("queued", "active", "sessions"):
            self._metrics.gauge(name, lambda name=name: self._switchboard.load[name])  # type: ignore[misc]
        collect_garbage()

        def failed_over(found: LoadedModel) -> None:
            # One that only finishes what it has accepted is not what ``info`` tells of.
            if self.served is not None and self.served.caches is caches:
                self._publish(found)

        scheduler.start(Failover(model, caches, failed_over))
        return Served(model, scheduler, caches)

    def _publish(self, model: LoadedModel) -> None:
        """Also when another provider goes on with the model."""
        self._model = model
        update = {} if self._update is None else {"update": self._update}
        self._gateway.publish_info({**info_document(model, self._config), **update})

    def _online(self, model: LoadedModel) -> dict[str, Any]:
        manifest, mqtt = model.bundle.manifest, self._config.mqtt
        return {
            "bundle": f"{manifest.name} {manifest.version}",
            "provider": model.provider.name,
            "prepared": model.prepared,
            "load_s": round(model.load_s, 3),
            "broker": f"{mqtt.host}:{mqtt.port}",
        }


def collect_garbage() -> None:
    """Free what nobody refers to any more, and let the collector look at the rest no more.

    What has been loaded stays, and to look at it would cost milliseconds each time; until another bundle replaces it.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    trim_memory()


def update_document(digest: str | None, failed: Health | None) -> dict[str, Any]:
    """How an activation ended, for ``info``; ``failed`` None: the bundle serves. A digest of None is the bundle that
    comes with edge_llm."""
    reason = {} if failed is None else {"kind": failed.kind, "reason": failed.detail}
    return {"digest": digest, "ok": failed is None, **reason}


def info_document(model: LoadedModel, config: Config) -> dict[str, Any]:
    """The retained info document."""
    manifest = model.bundle.manifest
    quality = next((entry for entry in manifest.quality if entry.target == model.provider.target), None)
    return {
        "bundle": {
            "name": manifest.name,
            "version": manifest.version,
            "digest": model.bundle.digest,
            "source": manifest.source,
            "license": manifest.license,
            "architecture": manifest.model.architecture,
            "target": model.provider.target,
            "quality": None
            if quality is None
            else {
                "reference": manifest.reference,
                "perplexity_ratio": quality.perplexity_ratio,
                "max_perplexity_ratio": quality.max_perplexity_ratio,
            },
        },
        "provider": {"used": model.provider.name, "refused": model.provider.refused, "prepared": model.prepared},
        "device": config.device,
        "limits": {
            "context": manifest.model.max_seq_len,
            "slots": config.engine.slots,
            "max_queued": config.serving.max_queued,
            "max_queued_per_user": config.serving.max_queued_per_user,
            "max_payload_bytes": config.serving.max_payload_bytes,
            "max_tokens": config.serving.max_tokens,
        },
        "features": _features(config, model),
        "domain": None if model.domain is None else _domain_info(model.domain.schema),
        "versions": {
            "edge_llm": __version__,
            "contract": 1,
            "onnxruntime": ort.__version__,
            "python": platform.python_version(),
        },
    }


def _domain_info(schema: DomainSchema) -> dict[str, Any]:
    """What the host may be asked to do, and the values that it should publish."""
    return {
        "name": schema.name,
        "version": schema.version,
        "actions": {action.name: list(action.slots) for action in schema.actions},
        "state": list(schema.state),
    }


def _features(config: Config, model: LoadedModel) -> list[str]:
    optional = {
        "partials": config.cache.prefix and config.prefetch.partials,
        "speculation": config.cache.prefix and config.prefetch.speculation,
        "response_cache": config.cache.responses,
    }
    always = ["stream", "cancel", "supersedes", "priority", "deadline", "pool"]
    # A domain model answers each query by itself.
    always += ["session"] if model.domain is None else ["actions"]
    return always + [name for name, used in optional.items() if used]
