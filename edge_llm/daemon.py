"""``edge-llm serve``: wiring only. Build the parts, start them, wait for a signal, drain, stop.

The link comes first, so that clients see ``preparing`` and ``loading`` and a redelivered query can wait; queries are
let through once the model has generated its first token.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

from edge_llm.bundle.prepare import BUILD_TIMEOUT_S
from edge_llm.bundle.store import BundleStore
from edge_llm.cache.erasure import ErasureNotices
from edge_llm.config import bundle_store_dir, state_dir
from edge_llm.device.memory import limit_malloc_arenas
from edge_llm.errors import BundleError, ConfigError, MemoryPlanError
from edge_llm.metrics import Metrics
from edge_llm.mqtt.gateway import Gateway
from edge_llm.node import Node
from edge_llm.notify import Notifier, Watchdog, watchdog_timeout_s
from edge_llm.store_start import StoreStart
from edge_llm.updating import Updater

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from edge_llm.bundle.manifest import Bundle
    from edge_llm.config import Config

_log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 5.0
# What loading takes beside preparing, at the very most.
_LOAD_TIMEOUT_S = 300.0
_SIGNAL_TICK_S = 0.5
# A stop while loading is somebody's wish if it comes so early; later it is rather systemd, whose TimeoutStartSec= has
# passed: then the start counts as one that failed.
_YOUNG_START_S = 60.0


class _StopRequested(BaseException):
    """A signal came while the model was being prepared or loaded; not an ``Exception``, so that nothing swallows it."""


def serve(config: Config, bundle: Bundle | None = None) -> int:
    """Answer queries until SIGTERM or SIGINT; returns the exit status.

    Args:
        config: the settings.
        bundle: what to serve; None is what the bundle store says, which is followed from then on.

    Raises:
        BundleError: the bundle cannot be served here.
        ConfigError: the settings for the broker cannot be used.
    """
    began_at = time.monotonic()
    limit_malloc_arenas(2)
    metrics = Metrics()
    notices = ErasureNotices(state_dir(config))
    gateway = Gateway(config, metrics)
    # After the settings have been found good: a bundle is not to blame for them.
    store = None if bundle is not None else BundleStore(bundle_store_dir(config))
    start = None if store is None else StoreStart(store, config, metrics)
    first = bundle if start is None else start.bundle()
    assert first is not None
    notifier = Notifier.from_environ(os.environ)

    def report(state: Any, about: Bundle, **detail: Any) -> None:
        gateway.set_state(state, bundle=about.manifest.name, **detail)
        notifier.status(" ".join((state, about.manifest.name, *(f"{key}={value}" for key, value in detail.items()))))
        if state == "preparing":
            notifier.extend_start(BUILD_TIMEOUT_S + _LOAD_TIMEOUT_S)

    node = Node(config, gateway, metrics, report)
    with _stop_signals() as stop:
        try:
            report("loading", first)
            gateway.start()
            _start_first(node, start, first)
            stop.arm()
        except _StopRequested:
            notifier.stopping("stopped while loading")
            gateway.close(CLOSE_TIMEOUT_S)
            return _stopped_while_loading(start, time.monotonic() - began_at)
        except BaseException:
            gateway.close(CLOSE_TIMEOUT_S)
            raise

        updater = None if store is None else Updater(store, config, node, metrics, stop.hurry)

        def tick() -> None:
            for erasure in notices.poll():
                node.forget(erasure)
            _update(updater, stop)

        try:
            _watch(stop, notifier, node, gateway, tick)
        except BaseException:
            # Neither the new bundle nor the old one can be loaded: a new start may do better.
            gateway.close(CLOSE_TIMEOUT_S)
            raise
        _log.info("stopping: finishing what was accepted; a second signal cuts it short")
        notifier.stopping("draining")
        if updater is not None:
            updater.close()
        if not node.drain(config.serving.drain_timeout_s, stop.hurry):
            _log.warning("some queries did not finish and were cancelled")
        gateway.close(CLOSE_TIMEOUT_S)
        node.close()
    return 0


def _start_first(node: Node, start: StoreStart | None, bundle: Bundle) -> None:
    """Load the first bundle that can be served. Raises as ``load_model`` does, for the last one that there is."""
    while True:
        try:
            model = node.load(bundle)
            break
        except BundleError as reason:
            if start is None:
                raise
            start.give_up(reason)
            bundle = start.bundle()
        except (ConfigError, MemoryPlanError):
            if start is not None:
                # The settings, or the machine: no bundle is to blame.
                start.uncount()
            raise
    node.start(model)
    if start is not None:
        # Recorded first, so that what is announced is what the next start finds.
        start.ready()
    node.announce(None if start is None else start.update)


def _stopped_while_loading(start: StoreStart | None, age_s: float) -> int:
    """The exit status of a daemon that a signal ended before it served; only a young start does not count."""
    if age_s >= _YOUNG_START_S:
        return 1
    if start is not None:
        start.uncount()
    return 0


def _update(updater: Updater | None, stop: _StopFlag) -> None:
    again = stop.reload.is_set()
    stop.reload.clear()
    if updater is not None:
        updater.tick(again=again)
    elif again:
        _log.info("nothing to reload: the bundle was named, so the store is not followed")


def _watch(stop: _StopFlag, notifier: Notifier, node: Node, gateway: Gateway, act: Callable[[], None]) -> None:
    """Tell systemd that we serve, and that our threads move, until a signal comes; ``act`` now and then."""
    timeout_s = watchdog_timeout_s(os.environ)
    # Asked anew each time: engines come and go.
    watchdog = Watchdog(notifier, lambda: node.heartbeats, timeout_s)

    def tick() -> None:
        watchdog.tick()
        notifier.status(_status(gateway))
        act()

    # The model has answered; the broker may come later.
    notifier.ready(_status(gateway))
    stop.wait(tick, _SIGNAL_TICK_S if watchdog.interval_s is None else min(_SIGNAL_TICK_S, watchdog.interval_s / 2))


def _status(gateway: Gateway) -> str:
    return "online" if gateway.link.connected else f"online; {gateway.link.trouble or 'connecting to the broker'}"


class _StopFlag:
    """Set by a signal. Until it is armed, a signal interrupts whatever the main thread is doing.

    Attributes:
        hurry: set by a second signal.
        reload: set by SIGHUP.
    """

    def __init__(self) -> None:
        self.hurry = threading.Event()
        self.reload = threading.Event()
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
        if signal_number == signal.SIGHUP:
            self.reload.set()
            return
        if self._event.is_set():
            self.hurry.set()
        self._event.set()
        if not self._armed:
            self._armed = True
            raise _StopRequested


@contextlib.contextmanager
def _stop_signals() -> Iterator[_StopFlag]:
    flag = _StopFlag()
    before = {number: signal.signal(number, flag.handle) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
