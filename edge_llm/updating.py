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

from edge_llm.bundle.shipped import open_bundle
from edge_llm.bundle.store import Health
from edge_llm.engine.probe import check_bundle
from edge_llm.errors import BundleError, BundleHealthError, MemoryPlanError
from edge_llm.node import collect_garbage, update_document

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge_llm.bundle.store import BundleStore, Selection
    from edge_llm.config import Config
    from edge_llm.engine.loading import LoadedModel
    from edge_llm.metrics import Metrics
    from edge_llm.node import Node, Served

_log = logging.getLogger(__name__)


class _Attempt(threading.Thread):
    """One try to switch.

    Attributes:
        digest: of an installed bundle; None is the one that comes with edge_llm.
        key: what asked for it.
        give_up_at: ``time.monotonic()`` after which it has failed; None while it waits for answers to end.
        abandoned: its result is not wanted any more.
        alone: the old bundle is not loaded any more.
        fatal: nothing serves any more, and this is why.
    """

    def __init__(self, updater: Updater, digest: str | None, key: tuple[str | None, str | None]) -> None:
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
        self._tried: tuple[str | None, str | None] | None = None
        self._attempt: _Attempt | None = None
        # What the store is still to be told, in this order: the disk was full, or read-only.
        self._unwritten: list[Callable[[], Selection]] = []
        self._write_failed = False
        # Held while an attempt takes effect, so that it is either in time or not.
        self._lock = threading.Lock()

    def tick(self, *, again: bool = False) -> None:
        """Look whether another bundle is to be served, and how far the switch is.

        Args:
            again: try again what has failed before (SIGHUP).

        Raises:
            EdgeLlmError: neither the new bundle nor the old one could be loaded.
        """
        if self._unwritten:
            with self._lock:
                self._write()
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
        wanted = selection.wanted
        digest = selection.current if wanted is None else wanted.digest
        key = (digest, None if wanted is None else wanted.request)
        # Nothing wanted, nothing current and nothing before: an empty store, or a selection that is lost or damaged.
        empty = digest is None and wanted is None and selection.previous is None
        if empty or (key == self._tried and not again):
            return
        served = self._node.served
        if served is not None and served.bundle.digest == (digest or self._shipped_digest()):
            self._tried = key
            if wanted is not None:
                self._commit(digest)
                self._node.set_update(update_document(served.bundle.digest, None))
            elif again:
                _log.info("the current bundle is being served already")
            return
        self._tried = key
        self._attempt = _Attempt(self, digest, key)
        self._attempt.start()

    def _shipped_digest(self) -> str | None:
        try:
            return open_bundle(self._store, None).digest
        except BundleError:
            return None

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
        bundle = check_bundle(self._store, attempt.digest, self._config)
        return self._take_over(attempt, self._node.load(bundle, beside=True))

    def _afterwards(self, attempt: _Attempt) -> None:
        """Load the new one when the old one has gone; if it fails, the old one comes back.

        Raises:
            Exception: the new one failed, and the old one as well.
        """
        served = self._node.served
        assert served is not None
        old = served.bundle
        with self._lock:
            if attempt.abandoned:
                return
            attempt.alone = True
            attempt.give_up_at = None
        # The old one may have to come back: what is prepared of it is not to be tidied away meanwhile.
        _kept = served.model.copy_in_use
        self._node.pause(open_bundle(self._store, attempt.digest, self._config.bundle_keys), self._hurry)
        del served
        collect_garbage()
        failure = self._try_alone(attempt)
        if failure is None:
            return
        _log.warning("back to the old bundle: %s", failure)
        collect_garbage()
        try:
            self._take_over(attempt, self._node.load(old), failure)
        except Exception as fatal:
            attempt.fatal = fatal
            raise failure from None

    def _try_alone(self, attempt: _Attempt) -> Exception | None:
        try:
            attempt.give_up_at = time.monotonic() + self._limit_s
            bundle = check_bundle(self._store, attempt.digest, self._config)
            self._take_over(attempt, self._node.load(bundle))
        except Exception as reason:
            # Without the frames, which hold what was loaded: the old bundle needs its room.
            reason.__context__ = reason.__cause__ = None
            return reason.with_traceback(None)
        return None

    def _take_over(self, attempt: _Attempt, model: LoadedModel, failure: Exception | None = None) -> Served | None:
        """Let a model answer: the new one, or after a ``failure`` the old one. Recorded first, then announced."""
        with self._lock:
            attempt.give_up_at = None
            if attempt.abandoned:
                raise BundleHealthError("it came too late")
            before = self._node.start(model)
            if failure is not None:
                update = self._record_refusal(attempt.digest, failure)
            else:
                self._metrics.count("bundle_switches")
                self._commit(attempt.digest)
                update = update_document(model.bundle.digest, None)
            self._node.announce(update)
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

    def _commit(self, digest: str | None) -> None:
        self._unwritten.append(lambda: self._store.activated(digest))
        self._write()
        _log.info("switched to another bundle", extra={"digest": digest})

    def _refuse(self, digest: str | None, reason: Exception) -> None:
        self._node.set_update(self._record_refusal(digest, reason))

    def _record_refusal(self, digest: str | None, reason: Exception) -> dict[str, Any]:
        """In the log, the metrics and the store; what ``info`` is to say of it."""
        health = Health.failed(reason)
        _log.error("the bundle is not activated, the old one serves on: %s", health.detail, extra={"digest": digest})
        self._metrics.count(f"bundle_refused_{health.kind}")
        self._unwritten.append(lambda: self._store.refused(digest, health))
        self._write()
        return update_document(digest, health)

    def _write(self) -> None:
        """Tell the store what it does not know yet; ``tick`` tries again what could not be written."""
        while self._unwritten:
            try:
                self._unwritten[0]()
            except OSError as error:
                if not self._write_failed:
                    _log.warning("the bundle store cannot be written, so a restart will not know: %s", error)
                self._write_failed = True
                return
            self._write_failed = False
            del self._unwritten[0]
