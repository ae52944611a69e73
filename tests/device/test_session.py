from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import TINY_BUNDLE

ROOT = Path(__file__).parent.parent.parent
LOAD = """
from pathlib import Path
from edge_llm.device.session import make_session, session_options
make_session(Path({graph!r}), session_options(1))
"""


def files_left_by_a_session(home: Path, prefix: str = "") -> list[Path]:
    # onnxruntime keeps quiet by itself where CI is set.
    environ = {name: value for name, value in os.environ.items() if name not in ("ORT_DISABLE_TELEMETRY", "CI")}
    environ |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache"), "PYTHONPATH": str(ROOT)}
    code = prefix + LOAD.format(graph=str(TINY_BUNDLE / "graphs" / "cpu-int8" / "model.onnx"))
    subprocess.run([sys.executable, "-c", code], env=environ, cwd="/", check=True, timeout=60)
    return [path for path in home.rglob("*") if path.is_file()]


def test_a_session_leaves_no_device_id_and_no_usage_records(tmp_path):
    assert files_left_by_a_session(tmp_path) == []


def test_the_test_above_would_notice_them(tmp_path):
    import onnxruntime

    if not onnxruntime.__version__.startswith("1.31."):
        pytest.skip("it is onnxruntime 1.31 that is known to keep them")
    assert files_left_by_a_session(tmp_path, "import os; os.environ['ORT_DISABLE_TELEMETRY'] = '0'\n")
