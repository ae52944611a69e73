"""Measurements that are run by hand: ``python -m benchmarks.peers``, ``.daemon`` and ``.voice``.

docs/benchmarks.md says what they measure and what they have shown.
"""
