"""A manifest whose hashes are made right again, as who owns it can."""

from __future__ import annotations

import json
from pathlib import Path

from edge_llm.bundle.manifest import sha256_file


def reseal(bundle: Path) -> None:
    """Bring sizes and hashes of ``manifest.json`` up to date with the files."""
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_bytes())
    for entry in manifest["files"]:
        file = bundle / entry["path"]
        if file.is_file():
            entry |= {"size_bytes": file.stat().st_size, "sha256": sha256_file(file)}
    path.write_text(json.dumps(manifest))
