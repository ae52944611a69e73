"""What a voice assistant waits for, cache by cache: ``python -m benchmarks.voice`` (docs/benchmarks.md)."""
