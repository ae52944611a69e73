"""A bundle that is not what was exported: the daemon refuses it by name, and says offline."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest

from tests.faults.conftest import WAIT_S
from tests.paths import TINY_BUNDLE

pytestmark = pytest.mark.broker
GRAPH = "graphs/cpu-int8/model.onnx"


def flip(name: str) -> Callable[[Path], None]:
    def damage(bundle: Path) -> None:
        content = bytearray((bundle / name).read_bytes())
        content[len(content) // 2] ^= 1
        (bundle / name).write_bytes(content)

    return damage


def truncate(name: str) -> Callable[[Path], None]:
    def damage(bundle: Path) -> None:
        content = (bundle / name).read_bytes()
        (bundle / name).write_bytes(content[: len(content) // 2])

    return damage


def rewrite(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(bundle: Path) -> None:
        manifest = json.loads((bundle / "manifest.json").read_text())
        change(manifest)
        (bundle / "manifest.json").write_text(json.dumps(manifest))

    return damage


DAMAGES = {
    "tampered graph": (flip(GRAPH), "graphs/cpu-int8/model.onnx does not match its SHA-256"),
    "tampered weights": (flip(f"{GRAPH}.data"), "model.onnx.data does not match its SHA-256"),
    "tampered tokenizer": (flip("tokenizer.json"), "tokenizer.json does not match its SHA-256"),
    "truncated graph": (truncate(GRAPH), "graphs/cpu-int8/model.onnx has"),
    "truncated weights": (truncate(f"{GRAPH}.data"), "model.onnx.data has"),
    "truncated manifest": (truncate("manifest.json"), "manifest.json is not valid"),
    "missing tokenizer": (lambda bundle: (bundle / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "another format": (rewrite(lambda manifest: manifest.update(format=9)), "manifest format 9 is not supported"),
    "a later runtime": (
        rewrite(lambda manifest: [graph.update(min_onnxruntime="99.0") for graph in manifest["graphs"]]),
        "needs onnxruntime 99.0",
    ),
    "graphs of another device": (
        rewrite(lambda manifest: manifest.update(graphs=[manifest["graphs"][0] | {"target": "tensorrt"}])),
        "tensorrt",
    ),
    "another shape": (
        rewrite(lambda manifest: manifest["model"].update(num_layers=manifest["model"]["num_layers"] + 1)),
        "graph and manifest may not belong together",
    ),
    "another head": (
        rewrite(lambda manifest: manifest["model"].update(head_dim=manifest["model"]["head_dim"] * 2)),
        "graph and manifest may not belong together",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bundle_that_is_not_as_exported_is_refused_by_name(mosquitto, start_faulty, listen, tmp_path, damage):
    spoil, words = DAMAGES[damage]
    spoil(shutil.copytree(TINY_BUNDLE, tmp_path / "bundle"))
    # With a copy to prepare where that is what meets the damage first.
    prepare = str("graph" in damage).lower()
    daemon = start_faulty(mosquitto.port, f"engine.prepare={prepare}", bundle=tmp_path / "bundle")
    assert daemon.process.wait(WAIT_S) == 2
    daemon.wait_log(words)
    assert "Traceback" not in daemon.log()
    # A manifest that cannot be read is refused before there is a connection.
    assert set(listen(mosquitto.port).statuses()) <= {"offline"}


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_a_graph_whose_packing_crashes_does_not_take_the_daemon_along(
    mosquitto, start_faulty, listen, tmp_path, number
):
    (tmp_path / "faults").mkdir()
    (tmp_path / "faults" / "packing").write_text(str(int(number)))
    client = listen(mosquitto.port)
    daemon = start_faulty(mosquitto.port, "engine.prepare=true")
    assert daemon.process.wait(WAIT_S) == 2, "refused, not crashed"
    daemon.wait_log(f"model.onnx is not used: packing it with onnxruntime {onnxruntime.__version__}")
    daemon.wait_log(f"was ended by {number.name}")
    # It has not been tried in the daemon's own process.
    assert "serving the bundle's own graph" not in daemon.log()
    assert "Traceback" not in daemon.log()
    daemon.set("packing", 0)
    since = time.monotonic()
    daemon.start()
    client.wait_status("online", since)
    assert client.answer()["type"] == "final"
