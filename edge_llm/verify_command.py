"""``edge-llm verify``: whether a bundle is what was exported, and by whom."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge_llm.bundle.manifest import Bundle
from edge_llm.bundle.signature import SIGNATURE_FILE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def verify_bundle(folder: str | Path, keys: Sequence[str | Path]) -> str:
    """Check every hash, and the signature if there are keys; a line for people.

    Raises:
        BundleError: something is wrong with the bundle.
        ConfigError: a key cannot be used.
    """
    bundle = Bundle.open(folder, keys)
    bundle.verify()
    manifest = bundle.manifest
    if keys:
        signed = "signed by a trusted key"
    elif (bundle.path / SIGNATURE_FILE).exists():
        signed = "the signature was not checked: give --public-key FILE, or set bundle_keys"
    else:
        signed = "not signed"
    return (
        f"{manifest.name} {manifest.version} ({bundle.digest[:12]}): {len(manifest.files)} files, every hash matches; "
        f"{signed}"
    )
