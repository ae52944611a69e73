"""Counters and percentiles."""

from __future__ import annotations

from edge_llm.metrics import RESERVOIR_SIZE, Metrics


def test_a_snapshot_has_it_all():
    metrics = Metrics()
    metrics.count("queries")
    metrics.count("queries", 2)
    metrics.gauge("waiting", lambda: 7)
    for value in range(1, 101):
        metrics.observe("ttft_ms", float(value))
    snapshot = metrics.snapshot()
    assert snapshot["counters"] == {"queries": 3}
    assert snapshot["gauges"] == {"waiting": 7}
    assert snapshot["latency"] == {"ttft_ms": {"count": 100, "p50": 50.0, "p95": 95.0, "p99": 99.0}}
    assert snapshot["uptime_s"] >= 0


def test_one_value_is_every_percentile():
    metrics = Metrics()
    metrics.observe("x", 4.0)
    assert metrics.snapshot()["latency"]["x"] == {"count": 1, "p50": 4.0, "p95": 4.0, "p99": 4.0}


def test_reservoirs_are_bounded_and_recent():
    metrics = Metrics()
    for value in range(RESERVOIR_SIZE * 2):
        metrics.observe("x", float(value))
    summary = metrics.snapshot()["latency"]["x"]
    assert summary["count"] == RESERVOIR_SIZE
    assert summary["p50"] >= RESERVOIR_SIZE
