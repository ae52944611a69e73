"""``python -m benchmarks.fuzz``."""

from __future__ import annotations

from benchmarks.fuzz.command import main

raise SystemExit(main())
