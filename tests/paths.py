"""Where the tests' data lies."""

from __future__ import annotations

from pathlib import Path
from typing import Final

TINY_BUNDLE: Final = Path(__file__).parent / "data" / "tiny_bundle"
