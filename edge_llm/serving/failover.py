"""When the provider fails that has served so far (out of memory, driver lost): the next one goes on, once."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from edge_llm.errors import EdgeLlmError

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge_llm.engine.loading import LoadedModel
    from edge_llm.serving.caches import Caches

_log = logging.getLogger(__name__)


class Failover:
    """Replaces the engine's runner after a fault. The engine's thread owns it.

    Args:
        model: what serves at first.
        caches: whose keys and values are worth nothing to another provider.
        on_change: told what serves from now on.
    """

    def __init__(self, model: LoadedModel, caches: Caches, on_change: Callable[[LoadedModel], None]) -> None:
        self._model = model
        self._caches = caches
        self._on_change = on_change

    def is_possible(self) -> bool:
        """Whether another provider is left. One that fails on the processor has no hardware to lose."""
        return self._model.fall_back is not None

    def go_on(self, fault: Exception) -> bool:
        """Load the next provider; it takes a moment. False if none serves. No sequence may be running."""
        failed, fall_back = self._model.provider.name, self._model.fall_back
        assert fall_back is not None
        _log.error("%s has failed; loading the next provider", failed, exc_info=fault)
        try:
            found = fall_back()
        except (EdgeLlmError, OSError) as error:
            _log.error("no other provider serves: %s", error)
            return False
        # It falls back once: what fails on two providers is not the hardware.
        self._model.engine.replace_runner(found.engine.runner)
        self._model = found
        self._caches.reuse.forget(found.engine.runner.cache.token_nbytes)
        if self._caches.snapshots is not None:
            # They are keyed by the provider that is gone.
            self._caches.snapshots.close(0.0)
            self._caches.snapshots = None
        _log.warning("%s serves from now on", found.provider.name)
        self._on_change(found)
        return True
