"""A running daemon follows the bundle store: another bundle is activated, and it switches without losing a query.

    wanted ─► signature, hashes ─► health prompt in a process of its own ─► load beside ─► new queries go there
                                              │ no memory                                   the old one finishes its own
                                              └──► drain, free the old one ─► health prompt ─► load ─► online again

Whatever fails on the way, the old bundle serves on, or again, and the reason is in the log, ``info`` and the metrics.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any

from edge_llm.bundle.manifest import Bundle
from edge_llm.bundle.shipped import shipped_bundle
from edge_llm.bundle.store import BundleStore, Health
from edge_llm.engine.probe import check_installed
from edge_llm.errors import BundleError, BundleHealthError, MemoryPlanError
from edge_llm.node import collect_garbage

if TYPE_CHECKING:
    from pathlib import Path

    from edge_llm.config import Config
    from edge_llm.engine.loading import LoadedModel
    from edge_llm.metrics import Metrics
    from edge_llm.node import Node, Served

_log = logging.getLogger(__name__)


class _Attempt(threading.Thread):
    """One try to switch.

    Attributes:
        key: what asked for it.
        give_up_at: ``time.monotonic()`` after which it has failed; None while it waits for answers to end.
        abandoned: its result is not wanted any more.
        alone: the old bundle is not loaded any more.
        fatal: nothing serves any more, and this is why.
    """

    def __init__(self, updater: Updater, digest: str, key: tuple[str, str | None]) -> None:
        super().__init__(name="bundle-switch", daemon=True)
        self._updater = updater
        self.digest = digest
        self.key = key
        self.give_up_at: float | None = None
        self.abandoned = False
        self.alone = False
        self.fatal: Exception | None = None

    def run(self) -> None:
        """See ``Updater.attempt``."""
        self._updater.attempt(self)


class Updater:
    """Switches bundles as the store says. ``tick`` and ``close`` are for the main thread.

    Args:
        store: what is followed.
        config: the settings.
        node: what serves.
        metrics: counts ``bundle_switches``, ``bundle_rollbacks`` and, by their reason, ``bundle_refused_…``.
        hurry: set when the daemon is to stop at once.
    """

    def __init__(
        self, store: BundleStore, config: Config, node: Node, metrics: Metrics, hurry: threading.Event
    ) -> None:
        self._store = store
        self._config = config
        self._node = node
        self._metrics = metrics
        self._hurry = hurry
        self._signature: object = object()  # nothing has been looked at
        self._tried: tuple[str, str | None] | None = None
        self._attempt: _Attempt | None = None
        # Held while an attempt takes effect, so that it is either in time or not.
        self._lock = threading.Lock()

    def tick(self, *, again: bool = False) -> None:
        """Look whether another bundle is to be served, and how far the switch is.

        Args:
            again: try again what has failed before (SIGHUP).

        Raises:
            EdgeLlmError: neither the new bundle nor the old one could be loaded.
        """
        attempt = self._attempt
        if attempt is not None:
            if attempt.is_alive() and not attempt.abandoned:
                self._give_up_if_late(attempt)
            if attempt.is_alive():
                self._refuse_others(attempt)
                return
            self._attempt = None
            if attempt.fatal is not None:
                raise attempt.fatal
        signature = self._store.signature()
        if signature != self._signature or again:
            self._signature = signature
            self._follow(again=again)

    def close(self) -> None:
        """Let no switch take effect any more."""
        with self._lock:
            if self._attempt is not None:
                self._attempt.abandoned = True

    def _follow(self, *, again: bool) -> None:
        selection = self._store.selection()
        serving = None if self._node.served is None else self._node.served.bundle.digest
        wanted = selection.wanted
        digest = selection.current if wanted is None else wanted.digest
        key = (digest or "", None if wanted is None else wanted.request)
        if digest is None or (key == self._tried and not again):
            return
        if digest == serving:
            self._tried = key
            if wanted is not None:
                self._commit(digest)
                self._node.set_update(update_document(digest, None))
            elif again:
                _log.info("the current bundle is being served already")
            return
        self._tried = key
        self._attempt = _Attempt(self, digest, key)
        self._attempt.start()

    # -- on the attempt's thread --------------------------------------------------------------------------------------

    def attempt(self, attempt: _Attempt) -> None:
        """Switch, or stay; what becomes of it is recorded."""
        _log.info("switching to another bundle", extra={"digest": attempt.digest})
        try:
            try:
                before = self._beside(attempt)
            except MemoryPlanError as reason:
                _log.info("no memory for two bundles at a time, so one after the other: %s", reason)
                before = None
            if before is None:
                self._afterwards(attempt)
        except Exception as reason:  # whatever it is, the old one serves
            with self._lock:
                if not attempt.abandoned:
                    self._refuse(attempt.digest, reason)
            return
        if before is not None:
            self._node.retire(before, self._hurry)
            del before
            collect_garbage()

    def _beside(self, attempt: _Attempt) -> Served | None:
        """Load the new one while the old one serves; returns that. Raises ``MemoryPlanError`` if both do not fit."""
        attempt.give_up_at = time.monotonic() + self._limit_s
        bundle = check_installed(self._store, attempt.digest, self._config)
        return self._take_over(attempt, self._node.load(bundle, beside=True))

    def _afterwards(self, attempt: _Attempt) -> None:
        """Load the new one when the old one has gone; if it fails, the old one comes back."""
        served = self._node.served
        assert served is not None
        old = served.bundle
        with self._lock:
            if attempt.abandoned:
                return
            attempt.alone = True
            attempt.give_up_at = None
        self._node.pause(self._store.open(attempt.digest, self._config.bundle_keys), self._hurry)
        del served
        collect_garbage()
        failure = self._try_alone(attempt)
        if failure is None:
            return
        _log.warning("back to the old bundle: %s", failure)
        collect_garbage()
        try:
            self._take_over(attempt, self._node.load(old), commit=False)
        except Exception as fatal:
            attempt.fatal = fatal
        raise failure

    def _try_alone(self, attempt: _Attempt) -> Exception | None:
        try:
            attempt.give_up_at = time.monotonic() + self._limit_s
            bundle = check_installed(self._store, attempt.digest, self._config)
            self._take_over(attempt, self._node.load(bundle))
        except Exception as reason:
            # Without the frames, which hold what was loaded: the old bundle needs its room.
            reason.__context__ = reason.__cause__ = None
            return reason.with_traceback(None)
        return None

    def _take_over(self, attempt: _Attempt, model: LoadedModel, *, commit: bool = True) -> Served | None:
        with self._lock:
            attempt.give_up_at = None
            if attempt.abandoned:
                raise BundleHealthError("it came too late")
            if not commit:
                return self._node.start(model)
            before = self._node.start(model, update_document(model.bundle.digest, None))
            self._metrics.count("bundle_switches")
            self._commit(model.bundle.digest)
            return before

    # -- what is recorded ---------------------------------------------------------------------------------------------

    @property
    def _limit_s(self) -> float:
        # The process of its own has the time; to load what it has prepared takes a part of it again.
        return 2 * self._config.activation_timeout_s

    def _give_up_if_late(self, attempt: _Attempt) -> None:
        with self._lock:
            late = attempt.give_up_at is not None and time.monotonic() > attempt.give_up_at
            if not late or attempt.abandoned:
                return
            attempt.abandoned = True
            reason = BundleHealthError("it was not loaded within twice activation_timeout_s")
            self._refuse(attempt.digest, reason)
        if attempt.alone:
            # Its thread cannot be ended, and holds what the old bundle needs: only a new process helps.
            raise reason

    def _refuse_others(self, attempt: _Attempt) -> None:
        """One that was given up and does not end is in the way of every other."""
        signature = self._store.signature()
        if attempt.abandoned and signature != self._signature:
            self._signature = signature
            wanted = self._store.selection().wanted
            if wanted is not None:
                self._refuse(wanted.digest, BundleHealthError("an earlier activation hangs: restart the daemon"))

    def _commit(self, digest: str) -> None:
        try:
            self._store.activated(digest)
        except OSError as error:
            _log.warning("the bundle is served, but a restart will not know: %s", error)
        _log.info("switched to another bundle", extra={"digest": digest})

    def _refuse(self, digest: str, reason: Exception) -> None:
        health = Health.failed(reason)
        _log.error("the bundle is not activated, the old one serves on: %s", health.detail, extra={"digest": digest})
        self._metrics.count(f"bundle_refused_{health.kind}")
        try:
            self._store.refused(digest, health)
        except OSError as error:
            _log.warning("the bundle store cannot be written: %s", error)
        self._node.set_update(update_document(digest, health))


def update_document(digest: str, failed: Health | None) -> dict[str, Any]:
    """How an activation ended, for ``info``; ``failed`` None: the bundle serves."""
    reason = {} if failed is None else {"kind": failed.kind, "reason": failed.detail}
    return {"digest": digest, "ok": failed is None, **reason}


class StoreStart:
    """What a starting daemon serves when no bundle was named: the store's current one, and when that fails, the one
    before, and at last the one that comes with edge_llm.

    Args:
        store: where they are.
        config: with the keys.
        metrics: counts ``bundle_rollbacks``.

    Attributes:
        update: for ``info``: what was given up, if anything was.
    """

    def __init__(self, store: BundleStore, config: Config, metrics: Metrics) -> None:
        self._store = store
        self._config = config
        self._metrics = metrics
        self.update: dict[str, Any] | None = None
        self._shipped = _usable_shipped(config)
        try:
            self._follows = store.follow()
            crashed = store.selection().current
            selection, given_up = store.begin_start(self._shipped)
            if given_up is not None and crashed is not None:
                self._note(crashed, given_up)
        except OSError as error:
            _log.warning("the bundle store cannot be written, so starts are not counted: %s", error)
            selection = store.selection()
        self._current = selection.current

    def bundle(self) -> Bundle:
        """What to serve; every call that follows a failure gives the next one.

        Raises:
            BundleError: nothing is left that could be served.
            ConfigError: a key cannot be used.
        """
        while self._current is not None:
            try:
                return self._store.open(self._current, self._config.bundle_keys)
            except BundleError as reason:
                self.roll_back(reason)
        return Bundle.open(shipped_bundle(), self._config.bundle_keys)

    def roll_back(self, reason: BundleError) -> None:
        """Give up the current bundle, which cannot be served. Raises ``reason`` if there is nothing to go back to."""
        failed = self._current
        if failed is None:
            raise reason
        health = Health.failed(reason)
        try:
            selection = self._store.roll_back(failed, health, self._shipped)
            if selection is not None:
                self._store.begin_start(self._shipped)
        except OSError as error:
            _log.warning("the bundle store cannot be written: %s", error)
            raise reason from None
        if selection is None:
            raise reason
        self._note(failed, health)
        self._current = selection.current

    def ready(self) -> None:
        """READY, or ended on purpose: the start does not count as a failed one."""
        try:
            self._store.end_start()
        except OSError as error:
            _log.warning("the bundle store cannot be written: %s", error)

    def _note(self, digest: str, health: Health) -> None:
        _log.error("rolled back to the bundle before: %s", health.detail, extra={"digest": digest})
        self._metrics.count("bundle_rollbacks")
        self.update = update_document(digest, health)


def _usable_shipped(config: Config) -> Path | None:
    """The bundle that comes with edge_llm, if there is one that may be served here."""
    try:
        return Bundle.open(shipped_bundle(), config.bundle_keys).path
    except BundleError:
        return None
