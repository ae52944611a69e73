"""``edge-llm serve`` that seems to have no memory for two bundles: each is refused once while another is loaded.

python -m tests.integration.narrow_daemon serve …
"""

from __future__ import annotations

import sys
from typing import Any

from edge_llm import cli, updating
from edge_llm.engine.probe import check_bundle
from edge_llm.errors import MemoryPlanError

refused: set[str] = set()


def check(store: Any, digest: str, config: Any) -> Any:
    if digest not in refused:
        refused.add(digest)
        raise MemoryPlanError("there is no memory for two")
    refused.discard(digest)
    return check_bundle(store, digest, config)


if __name__ == "__main__":
    updating.check_bundle = check
    sys.exit(cli.main())
