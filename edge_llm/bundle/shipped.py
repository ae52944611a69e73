"""What is served when no bundle is named: the store's current one, or the one that comes with edge_llm."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from edge_llm.bundle.manifest import MANIFEST_FILE, Bundle
from edge_llm.bundle.store import BundleStore
from edge_llm.config import bundle_store_dir
from edge_llm.errors import BundleNotFoundError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edge_llm.config import Config

SHIPPED_NAME: Final = "vehicle-gpt2-int8"
# In the wheel it lies inside the package; in a checkout, beside it.
_FOLDERS: Final = (
    Path(__file__).parent.parent / "bundles",
    Path(__file__).parent.parent.parent / "bundles",
)


def bundle_folder(config: Config) -> Path:
    """The bundle that was named, else the store's current one, else the shipped one. Raises ``BundleNotFoundError``."""
    if config.bundle is not None:
        return Path(config.bundle)
    store = BundleStore(bundle_store_dir(config))
    current = store.selection().current
    return shipped_bundle() if current is None else store.path(current)


def open_bundle(store: BundleStore, digest: str | None, keys: Sequence[str | Path] = ()) -> Bundle:
    """An installed bundle; None is the one that comes with edge_llm. Raises as ``BundleStore.open`` does."""
    return Bundle.open(shipped_bundle(), keys) if digest is None else store.open(digest, keys)


def shipped_bundle() -> Path:
    """Its folder. Raises ``BundleNotFoundError`` if this installation has none."""
    for folder in _FOLDERS:
        if (folder / SHIPPED_NAME / MANIFEST_FILE).is_file():
            return folder / SHIPPED_NAME
    raise BundleNotFoundError(
        "no bundle: give --bundle FOLDER, the folder that `python -m export bundle` or `python -m export distill` wrote"
    )
