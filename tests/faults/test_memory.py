"""A machine without enough memory: refused before loading, or in a single run."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import pytest

from export.graph.weights import CPU_FP32
from export.pipeline import ExportOptions, export_checkpoint
from tests.faults.conftest import WAIT_S
from tests.generate_tiny_bundle import random_checkpoint

pytestmark = pytest.mark.broker
# What stays for everything but the long prompt below, whose prefill takes about four times as much.
SPARE_BYTES = 6_000_000
QUESTION = "How far is it to the coast, and is there a place to charge on the way? "
LONG_TEXT = QUESTION * 60


@pytest.fixture(scope="session")
def wide_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One wide layer: a long prompt in one chunk takes megabytes, and no time."""
    folder = tmp_path_factory.mktemp("wide")
    (folder / "text").write_text(QUESTION * 20)
    checkpoint = random_checkpoint(num_layers=1, num_heads=4, hidden_size=256, context_length=2048, endless=True)
    out = folder / "bundle"
    export_checkpoint(checkpoint, ExportOptions(out, (CPU_FP32,), folder / "text", max_perplexity_ratio=10.0))
    return out


def data_bytes(pid: int) -> int:
    """VmData of proc(5): what RLIMIT_DATA bounds, memory that is the process's own."""
    return int(Path(f"/proc/{pid}/status").read_text().split("VmData:")[1].split()[0]) * 1024


def test_a_run_that_gets_no_memory_costs_its_own_query_and_the_next_works(mosquitto, start_faulty, listen, wide_bundle):
    daemon = start_faulty(mosquitto.port, "engine.prefill_chunk=2048", bundle=wide_bundle)
    client = listen(mosquitto.port)
    client.wait_status("online")
    expected = client.answer("what is left", max_tokens=8)["text"]
    # Not RLIMIT_AS: the C library's heaps have their addresses already, and only then ask for the memory.
    _, hard = resource.prlimit(daemon.pid, resource.RLIMIT_DATA)
    resource.prlimit(daemon.pid, resource.RLIMIT_DATA, (data_bytes(daemon.pid) + SPARE_BYTES, hard))
    for attempt in range(2):
        event = client.terminal(client.ask(LONG_TEXT, id=f"long {attempt}"))
        assert (event["type"], event.get("code"), event.get("retriable")) == ("error", 500, True)
        assert client.answer("what is left", max_tokens=8)["text"] == expected
    assert daemon.log().count("bad_alloc") >= 2
    assert daemon.process.poll() is None
    assert client.metrics()["errors_500"] == 2
    # Memory again: what failed is answered.
    resource.prlimit(daemon.pid, resource.RLIMIT_DATA, (hard, hard))
    assert client.answer(LONG_TEXT)["usage"]["prompt_tokens"] > 1000


def test_what_the_machine_cannot_hold_is_refused_before_loading_with_the_sum(mosquitto, start_faulty, listen):
    client = listen(mosquitto.port)
    daemon = start_faulty(mosquitto.port, f"cache.max_bytes={10**15}")
    assert daemon.process.wait(WAIT_S) == 2
    daemon.wait_log("this needs")
    found = re.search(
        r"this needs (\d+) MB of memory \(weights (\d+) \+ \d+ slots? of 256 tokens (\d+) \+ prefix cache (\d+) \+ "
        r"program (\d+)\), and (\d+) MB are left \(.+\)\. Set fewer engine\.slots",
        daemon.log(),
    )
    assert found, daemon.log()
    total, *terms, left = (int(number) for number in found.groups())
    assert abs(total - sum(terms)) <= len(terms)  # each is rounded
    assert left < total
    assert "Traceback" not in daemon.log()
    assert "online" not in client.statuses()
