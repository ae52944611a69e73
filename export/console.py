"""What the export says while it works: short lines and progress bars on stderr."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def say(line: str) -> None:
    """Print one line on stderr without breaking a progress bar."""
    tqdm.write(line, file=sys.stderr)


def progress(description: str, total: int, *, unit: str, is_bytes: bool = False) -> Any:
    """A progress bar on stderr that disappears when it is done; call ``update(n)`` on it, close it with ``with``."""
    return tqdm(total=total, desc=description, unit=unit, unit_scale=is_bytes, leave=False, delay=0.5, file=sys.stderr)
