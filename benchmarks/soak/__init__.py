"""A daemon left alone with many users, some of them rude: ``python -m benchmarks.soak`` (docs/benchmarks.md)."""
