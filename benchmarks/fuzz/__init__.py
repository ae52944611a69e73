"""Fuzzing of everything that somebody else writes: ``python -m benchmarks.fuzz`` (docs/security.md)."""
