"""ONNX Runtime sessions: the settings that serving and preparing share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnxruntime as ort

from edge_llm.device.cpu import physical_cores
from edge_llm.errors import UnsupportedBundleError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def make_session(graph_path: Path, options: Any, providers: Sequence[str]) -> Any:
    """An ONNX Runtime session. Raises ``UnsupportedBundleError`` with ONNX Runtime's reason."""
    try:
        return ort.InferenceSession(str(graph_path), options, providers=list(providers))
    except Exception as error:  # ONNX Runtime raises bare pybind classes
        reason = str(error).strip().splitlines()[0]
        raise UnsupportedBundleError(f"onnxruntime {ort.__version__} cannot load {graph_path}: {reason}") from None


def session_options(threads: int) -> Any:
    """Session options shared by serving and preparing, since a prepared copy is made for exactly these."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or physical_cores()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Worker threads spin between the operators of a run, and never between runs: an idle daemon uses no processor.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # The arena's growth would keep the largest prefill's memory for ever; its blocks are small enough for malloc.
    options.enable_cpu_mem_arena = False
    return options
