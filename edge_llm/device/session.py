"""ONNX Runtime sessions: the settings that serving and preparing share, and where the nodes of one really run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import onnxruntime as ort

from edge_llm.device.cpu import physical_cores
from edge_llm.errors import ProviderError

if TYPE_CHECKING:
    from pathlib import Path

CPU: Final = "CPUExecutionProvider"
CUDA: Final = "CUDAExecutionProvider"
TENSORRT: Final = "TensorrtExecutionProvider"
# onnxruntime_session_options_config_keys.h; the first since 1.24.
_RECORD_ASSIGNMENT: Final = "session.record_ep_graph_assignment_info"
_NO_CPU_FALLBACK: Final = "session.disable_cpu_ep_fallback"


class PlacedNode(NamedTuple):
    """An operator, and the provider that runs it."""

    op_type: str
    provider: str


class Placement(NamedTuple):
    """Where a session runs. ``nodes`` is None where this onnxruntime does not tell."""

    providers: list[str]
    nodes: list[PlacedNode] | None


class Provider(NamedTuple):
    """An execution provider and its options."""

    name: str = CPU
    options: Mapping[str, str] = {}

    @property
    def captures_graphs(self) -> bool:
        """Whether decode steps are captured as CUDA graphs: the provider's own option ``enable_cuda_graph``."""
        return self.options.get("enable_cuda_graph", "0") in ("1", "True", "true")


CPU_PROVIDER: Final = Provider()


class Device(NamedTuple):
    """Where tensors lie: ONNX Runtime's name of the kind of device, and which one."""

    kind: str = "cpu"
    number: int = 0


def tensor_device(session: Any, provider: Provider) -> Device:
    """Where the tensors of a session belong: with the GPU, if one really runs it."""
    if CUDA in session.get_providers() or TENSORRT in session.get_providers():
        return Device("cuda", int(provider.options.get("device_id", "0")))
    return Device()


def make_session(graph_path: Path, options: Any, provider: Provider = CPU_PROVIDER) -> Any:
    """An ONNX Runtime session on one provider. Raises ``ProviderError`` with ONNX Runtime's reason."""
    if provider.name != CPU:
        if hasattr(ort.InferenceSession, "get_provider_graph_assignment_info"):
            options.add_session_config_entry(_RECORD_ASSIGNMENT, "1")
        else:
            # An older one does not tell where nodes run; it can be made to refuse instead.
            options.add_session_config_entry(_NO_CPU_FALLBACK, "1")
    try:
        return ort.InferenceSession(str(graph_path), options, providers=[(provider.name, dict(provider.options))])
    except Exception as error:  # ONNX Runtime raises bare pybind classes
        reason = str(error).strip().splitlines()[0]
        raise ProviderError(f"onnxruntime {ort.__version__} cannot load {graph_path}: {reason}") from None


def placement(session: Any) -> Placement:
    """Where the nodes of a session run."""
    providers = list(session.get_providers())
    if providers == [CPU] or not hasattr(session, "get_provider_graph_assignment_info"):
        return Placement(providers, None)
    nodes = [
        PlacedNode(node.op_type, subgraph.ep_name)
        for subgraph in session.get_provider_graph_assignment_info()
        for node in subgraph.get_nodes()
    ]
    return Placement(providers, nodes)


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
