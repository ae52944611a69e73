"""``edge-llm serve`` that can be made to hang.

While the file ``$HANG_ENGINE`` exists, runs of the graph do not end; while ``$HANG_LINK`` exists, the link's thread
does not come back from a message.

    python -m tests.integration.hanging_daemon serve …
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from edge_llm import cli
from edge_llm.engine.runner import Runner
from edge_llm.mqtt.gateway import Gateway


def hang_while(path: Path) -> None:
    while path.exists():
        time.sleep(0.01)


def hang_before(owner: type, method: str, path: Path) -> None:
    original = getattr(owner, method)

    def hanging(self: Any, *arguments: Any, **options: Any) -> Any:
        hang_while(path)
        return original(self, *arguments, **options)

    setattr(owner, method, hanging)


if __name__ == "__main__":
    hang_before(Runner, "prefill", Path(os.environ["HANG_ENGINE"]))
    hang_before(Gateway, "_on_message", Path(os.environ["HANG_LINK"]))
    sys.exit(cli.main())
