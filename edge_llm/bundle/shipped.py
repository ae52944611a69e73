"""The bundle that comes with edge_llm, which is served when none is named."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from edge_llm.bundle.manifest import MANIFEST_FILE
from edge_llm.errors import BundleNotFoundError

SHIPPED_NAME: Final = "vehicle-gpt2-int8"
# In the wheel it lies inside the package; in a checkout, beside it.
_FOLDERS: Final = (
    Path(__file__).parent.parent / "bundles",
    Path(__file__).parent.parent.parent / "bundles",
)


def shipped_bundle() -> Path:
    """Its folder. Raises ``BundleNotFoundError`` if this installation has none."""
    for folder in _FOLDERS:
        if (folder / SHIPPED_NAME / MANIFEST_FILE).is_file():
            return folder / SHIPPED_NAME
    raise BundleNotFoundError(
        "no bundle: give --bundle FOLDER, the folder that `python -m export bundle` or `python -m export distill` wrote"
    )
