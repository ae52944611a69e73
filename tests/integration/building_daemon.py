"""``edge-llm serve`` on a TensorRT that compiles an engine for as long as the file ``$HOLD_BUILD`` exists.

There is no TensorRT here: the build is a script, and the sessions run on the processor.

    python -m tests.integration.building_daemon serve …
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import onnxruntime as ort

from edge_llm import cli
from edge_llm.bundle import tensorrt_engines
from edge_llm.device import session
from edge_llm.device.session import CPU, CPU_PROVIDER, TENSORRT, PlacedNode, Placement, Provider
from edge_llm.engine import loading, runner

PROGRESS_S = 0.3
_BUILDER = """
import json, os, pathlib, sys, time
options = json.load(sys.stdin)["options"]
while os.path.exists(os.environ["HOLD_BUILD"]):
    time.sleep(0.01)
(pathlib.Path(options["trt_engine_cache_path"]) / "decode.engine").write_text("compiled")
"""


def on_the_processor(path: Path, options: Any, _provider: Provider = CPU_PROVIDER) -> Any:
    return session.make_session(path, options)


if __name__ == "__main__":
    ort.get_available_providers = lambda: [TENSORRT, CPU]
    tensorrt_engines._COMMAND = (sys.executable, "-c", _BUILDER)  # type: ignore[misc]
    tensorrt_engines.PROGRESS_S = PROGRESS_S  # type: ignore[misc]
    runner.make_session = on_the_processor
    loading.placement = lambda _session: Placement([TENSORRT, CPU], [PlacedNode("MatMul", TENSORRT)])
    sys.exit(cli.main())
