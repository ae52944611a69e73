"""How long the link waits before it connects again, and what it makes of connections that do not last."""

from __future__ import annotations

import logging
import random
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from edge_llm.config import MqttConfig

log = logging.getLogger(__name__)

# So many connections in a row that each lasted no longer than this look like two clients of one name.
_SUSPICIOUS: Final = 3
_SHORT_S: Final = 6.0


class Patience:
    """Counts attempts to connect, and connections that ended soon. One thread owns it.

    Args:
        config: the shortest and the longest wait.
        client_id: who we are to the broker.
    """

    def __init__(self, config: MqttConfig, client_id: str) -> None:
        self._config = config
        self._client_id = client_id
        self._attempt = 0
        self._short_connections = 0

    def wait_s(self, lasted_s: float, *, was_answered: bool) -> float:
        """Seconds to wait after a connection or an attempt: twice as long after each failure.

        With jitter: a fleet must not come back to its broker all at once.

        Args:
            lasted_s: how long it stood, or was tried.
            was_answered: whether the broker has answered it.
        """
        # A connection that stood for a while was a good one; one that did not must not be hammered.
        if was_answered and lasted_s > self._config.reconnect_max_s:
            self._attempt = 0
        delay_s = min(self._config.reconnect_max_s, self._config.reconnect_min_s * 2.0 ** min(self._attempt, 30))
        self._attempt += 1
        return delay_s * random.uniform(0.5, 1.0)  # noqa: S311 - not a secret

    def note_end(self, lasted_s: float, *, was_accepted: bool, wanted: bool) -> None:
        """A connection has ended, ``wanted`` if we ended it. Warns when one after the other ends soon."""
        if not was_accepted or lasted_s > _SHORT_S:
            self._short_connections = 0
            return
        self._short_connections += 1
        if self._short_connections == _SUSPICIOUS and not wanted:
            log.warning(
                "the broker ends each connection soon: is another client connected as %r? Each node needs its own name",
                self._client_id,
            )
