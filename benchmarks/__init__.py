"""Measurements that are run by hand: ``python -m benchmarks.peers`` and ``python -m benchmarks.daemon``.

docs/benchmarks.md says what they measure and what they have shown.
"""
