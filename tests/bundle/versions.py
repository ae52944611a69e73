"""The tiny bundle under other versions, and damaged in ways that only loading it shows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.paths import TINY_BUNDLE


def version_of(folder: Path, version: str) -> Path:
    """A copy of the tiny bundle with another version, and so another digest."""
    copy = Path(shutil.copytree(TINY_BUNDLE, folder / f"tiny-{version}"))
    path = copy / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": version}))
    return copy


def unhealthy(folder: Path, version: str) -> Path:
    """One whose every hash is right, and which answers its health prompt wrongly."""
    copy = version_of(folder, version)
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["expectation"]["token_ids"] = [(manifest["expectation"]["token_ids"][0] + 7) % 512]
    path.write_text(json.dumps(manifest))
    return copy
