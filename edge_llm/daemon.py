"""``edge-llm serve``: wiring only. Build the parts, start them, wait for a signal, drain, stop.

The link comes first, so that clients see ``preparing`` and ``loading`` and a redelivered query can wait; queries are
let through once the model has generated its first token.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import platform
import signal
import threading
from typing import TYPE_CHECKING, Any

import onnxruntime as ort

from edge_llm import __version__
from edge_llm.bundle.prepare import BUILD_TIMEOUT_S
from edge_llm.cache.erasure import ErasureNotices
from edge_llm.config import state_dir
from edge_llm.device.memory import limit_malloc_arenas
from edge_llm.engine.loading import LoadedModel, load_model
from edge_llm.metrics import Metrics
from edge_llm.mqtt.feedback import FeedbackRecorder
from edge_llm.mqtt.gateway import Gateway
from edge_llm.notify import Notifier, Watchdog, watchdog_timeout_s
from edge_llm.serving.caches import Caches, open_caches
from edge_llm.serving.failover import Failover
from edge_llm.serving.scheduler import Scheduler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from edge_llm.bundle.manifest import Bundle
    from edge_llm.config import Config
    from edge_llm.domain.schema import DomainSchema

_log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 5.0
# What loading takes beside preparing, at the very most.
_LOAD_TIMEOUT_S = 300.0
_SIGNAL_TICK_S = 0.5


class _StopRequested(BaseException):
    """A signal came while the model was being prepared or loaded; not an ``Exception``, so that nothing swallows it."""


def serve(config: Config, bundle: Bundle) -> int:
    """Answer queries until SIGTERM or SIGINT; returns the exit status.

    Raises:
        BundleError: the bundle cannot be served here.
        ConfigError: the settings for the broker cannot be used.
    """
    limit_malloc_arenas(2)
    metrics = Metrics()
    notices = ErasureNotices(state_dir(config))
    gateway = Gateway(config, metrics)
    notifier = Notifier.from_environ(os.environ)

    def report(state: Any) -> None:
        gateway.set_state(state, bundle=bundle.manifest.name)
        notifier.status(f"{state} {bundle.manifest.name}")
        if state == "preparing":
            notifier.extend_start(BUILD_TIMEOUT_S + _LOAD_TIMEOUT_S)

    with _stop_signals() as stop:
        try:
            report("loading")
            gateway.start()
            scheduler, caches = _start_scheduler(config, bundle, gateway, metrics, report)
            stop.arm()
        except _StopRequested:
            notifier.stopping("stopped while loading")
            gateway.close(CLOSE_TIMEOUT_S)
            return 0
        except BaseException:
            gateway.close(CLOSE_TIMEOUT_S)
            raise

        def forget_erased() -> None:
            for erasure in notices.poll():
                gateway.forget(erasure)
                scheduler.forget(erasure)
                caches.forget_users()

        _watch(stop, notifier, gateway, scheduler, forget_erased)
        _log.info("stopping: finishing what was accepted; a second signal cuts it short")
        notifier.stopping("draining")
        gateway.set_state("draining")
        if not scheduler.drain(config.serving.drain_timeout_s, hurry=stop.hurry):
            _log.warning("some queries did not finish and were cancelled")
        gateway.close(CLOSE_TIMEOUT_S)
        caches.close()
    return 0


def _watch(
    stop: _StopFlag, notifier: Notifier, gateway: Gateway, scheduler: Scheduler, forget_erased: Callable[[], None]
) -> None:
    """Tell systemd that we serve, and that our threads move, until a signal comes; forget whom we are told to."""
    heartbeats = {"mqtt-link": gateway.link.heartbeat, "engine": scheduler.heartbeat}
    watchdog = Watchdog(notifier, heartbeats, watchdog_timeout_s(os.environ))

    def tick() -> None:
        watchdog.tick()
        notifier.status(_status(gateway))
        forget_erased()

    # The model has answered; the broker may come later.
    notifier.ready(_status(gateway))
    stop.wait(tick, _SIGNAL_TICK_S if watchdog.interval_s is None else min(_SIGNAL_TICK_S, watchdog.interval_s / 2))


def _status(gateway: Gateway) -> str:
    return "online" if gateway.link.connected else f"online; {gateway.link.trouble or 'connecting to the broker'}"


def _start_scheduler(
    config: Config, bundle: Bundle, gateway: Gateway, metrics: Metrics, report: Callable[[str], None]
) -> tuple[Scheduler, Caches]:
    model = load_model(bundle, config, on_state=report)
    generation = bundle.manifest.generation
    caches = open_caches(model, config, metrics)
    if model.domain is not None:
        model.domain.values = gateway.state_values
    scheduler = Scheduler(
        model.engine, model.tokenizer, model.renderer, generation, config.serving, caches=caches, domain=model.domain
    )
    caches.power.on_change = gateway.set_power
    metrics.gauge("temperature_c", lambda: caches.power.temperature_c)
    for name in ("queued", "active", "sessions"):
        metrics.gauge(name, lambda name=name: scheduler.load[name])  # type: ignore[misc]
    # What has been loaded stays: the collector need not look at it again, which would cost milliseconds each time.
    gc.collect()
    gc.freeze()
    scheduler.start(Failover(model, caches, lambda found: gateway.publish_info(_info(found, config))))
    recorder = None if caches.feedback is None else FeedbackRecorder(caches.feedback)
    gateway.bind(scheduler, generation, recorder)
    gateway.publish_info(_info(model, config))
    gateway.set_state("online", bundle=bundle.manifest.name)
    _log.info(
        "online",
        extra={
            "bundle": f"{bundle.manifest.name} {bundle.manifest.version}",
            "provider": model.provider.name,
            "prepared": model.prepared,
            "load_s": round(model.load_s, 3),
            "broker": f"{config.mqtt.host}:{config.mqtt.port}",
        },
    )
    return scheduler, caches


def _info(model: LoadedModel, config: Config) -> dict[str, Any]:
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


class _StopFlag:
    """Set by a signal. Until it is armed, a signal interrupts whatever the main thread is doing.

    Attributes:
        hurry: set by a second signal.
    """

    def __init__(self) -> None:
        self.hurry = threading.Event()
        self._event = threading.Event()
        self._armed = False

    def arm(self) -> None:
        """From now on a signal only sets the flag."""
        self._armed = True

    def wait(self, tick: Callable[[], None], tick_s: float) -> None:
        """Wait for a signal; call ``tick`` every ``tick_s`` seconds."""
        # With a timeout: Python runs handlers on the main thread, but the kernel may hand the signal to another one,
        # and that does not end a wait without a timeout.
        while not self._event.wait(tick_s):
            tick()

    def handle(self, signal_number: int, _frame: Any) -> None:
        """The signal handler."""
        _log.info("received %s", signal.Signals(signal_number).name)
        if self._event.is_set():
            self.hurry.set()
        self._event.set()
        if not self._armed:
            self._armed = True
            raise _StopRequested


@contextlib.contextmanager
def _stop_signals() -> Iterator[_StopFlag]:
    flag = _StopFlag()
    before = {number: signal.signal(number, flag.handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
