"""Whether a bundle is older than what has been served: an old one that was signed stays valid, and may be replayed."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING

from edge_llm.bundle.shipped import open_bundle
from edge_llm.errors import BundleDowngradeError, BundleError

if TYPE_CHECKING:
    from edge_llm.bundle.manifest import Manifest
    from edge_llm.bundle.store import BundleStore


def refuse_downgrade(store: BundleStore, digest: str | None, manifest: Manifest) -> None:
    """See that no installed bundle of the same name that has been served is newer.

    Current, previous and what has answered its health prompt count. The previous one may always come back.

    Args:
        store: what is installed, and how each did.
        digest: of the bundle that is to be served; None is the one that comes with edge_llm.
        manifest: of the same.

    Raises:
        BundleDowngradeError: one is.
    """
    selection = store.selection()
    if digest in (selection.current, selection.previous):
        return
    served = {name for name, health in selection.health.items() if health.ok} | {selection.current}
    if selection.previous is not None:
        served.add(selection.previous)
    versions = []
    for other in served:
        with contextlib.suppress(BundleError):  # removed, or damaged
            before = open_bundle(store, other).manifest
            if before.name == manifest.name:
                versions.append(before.version)
    newest = max(versions, key=version_key, default=manifest.version)
    if version_key(newest) > version_key(manifest.version):
        raise BundleDowngradeError(
            f"{manifest.name} {manifest.version} is older than {newest}, which has been served here: "
            'set bundle_downgrade = "allow" to go back to it'
        )


def version_key(version: str) -> list[int]:
    """What a version is compared by: the numbers in it, from left to right; zeros at the end make no difference."""
    # Up to a letter that follows a number: 2.0-rc1 is no newer than 2.0, and the hash of a commit says nothing.
    release = re.match("[^0-9]*[^A-Za-z]*", version)
    numbers = [int(digits) for digits in re.findall("[0-9]+", release.group() if release else "")]
    while numbers and not numbers[-1]:
        numbers.pop()
    return numbers
