"""Which bundle a starting daemon serves when none was named, and what it goes back to."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from edge_llm.bundle.shipped import open_bundle
from edge_llm.bundle.store import MAX_FAILED_STARTS, Health, now
from edge_llm.errors import BundleError, ConfigError
from edge_llm.node import update_document

if TYPE_CHECKING:
    from edge_llm.bundle.manifest import Bundle
    from edge_llm.bundle.store import BundleStore
    from edge_llm.config import Config
    from edge_llm.metrics import Metrics

_log = logging.getLogger(__name__)


class StoreStart:
    """What a starting daemon serves when no bundle was named: the store's current one, and when that fails, the one
    before, and at last the one that comes with edge_llm.

    What is selected stays as it was until the replacement serves: if all fail, the bundle may not be to blame.

    Args:
        store: where they are.
        config: with the keys.
        metrics: counts ``bundle_rollbacks``.
    """

    def __init__(self, store: BundleStore, config: Config, metrics: Metrics) -> None:
        self._store = store
        self._config = config
        self._metrics = metrics
        self._failed: dict[str, Health] = {}
        has_shipped = _has_usable_shipped(store, config)
        self._earlier_starts = 0
        try:
            self._follows = store.follow()
            selection, self._earlier_starts = store.begin_start()
        except OSError as error:
            _log.warning("the bundle store cannot be written, so starts are not counted: %s", error)
            selection = store.selection()
        self._selected = selection.current
        choices = [selection.current]
        if selection.current is not None:
            if selection.previous is not None and store.path(selection.previous).is_dir():
                choices.append(selection.previous)
            if has_shipped:
                choices.append(None)
        # Each has so many starts; after the last one it is the current one's turn again.
        turn = self._earlier_starts // MAX_FAILED_STARTS % len(choices)
        for digest in choices[:turn]:
            self._note(
                digest,
                Health(
                    ok=False, at=now(), kind="crash_loop", detail=f"{MAX_FAILED_STARTS} starts without getting ready"
                ),
            )
        # The first is what is being tried.
        self._choices = choices[turn:] + choices[:turn]

    @property
    def update(self) -> dict[str, Any] | None:
        """For ``info``: what was given up, if the selected one was."""
        if self._choices[0] == self._selected:
            return None
        assert self._selected is not None
        return update_document(self._selected, self._failed[self._selected])

    def bundle(self) -> Bundle:
        """What to serve; every call that follows a failure gives the next one.

        Raises:
            BundleError: nothing is left that could be served.
            ConfigError: a key cannot be used.
        """
        while True:
            try:
                return open_bundle(self._store, self._choices[0], self._config.bundle_keys)
            except ConfigError:
                self.uncount()
                raise
            except BundleError as reason:
                self.give_up(reason)

    def give_up(self, reason: BundleError) -> None:
        """Go on with the next one. Raises ``reason`` if none is left; the start does not count then, as each was
        tried."""
        if len(self._choices) == 1:
            self.uncount()
            raise reason
        self._note(self._choices.pop(0), Health.failed(reason))

    def ready(self) -> None:
        """READY: what serves now is the current one."""
        serving = self._choices[0]
        try:
            if serving != self._selected:
                _log.error("rolled back to another bundle", extra={"digest": serving})
                self._metrics.count("bundle_rollbacks")
                self._store.roll_back(self._failed, serving)
            self._store.end_start()
        except OSError as error:
            _log.warning("the bundle store cannot be written: %s", error)

    def uncount(self) -> None:
        """Ended for a reason that is not the bundle's: the start does not count as a failed one."""
        if self._selected is None:
            return
        try:
            self._store.set_starts(self._selected, self._earlier_starts)
        except OSError as error:
            _log.warning("the bundle store cannot be written: %s", error)

    def _note(self, digest: str | None, health: Health) -> None:
        _log.error("the bundle cannot be served: %s", health.detail, extra={"digest": digest})
        if digest is not None:
            self._failed[digest] = health


def _has_usable_shipped(store: BundleStore, config: Config) -> bool:
    """Whether a bundle comes with edge_llm that may be served here."""
    try:
        open_bundle(store, None, config.bundle_keys)
    except BundleError:
        return False
    return True
