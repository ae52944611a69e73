"""Which options the GPU providers really have: read in the libraries of an onnxruntime-gpu wheel.

    pip download --no-deps onnxruntime-gpu==VERSION
    python -m tests.read_provider_options onnxruntime_gpu-VERSION-….whl

writes tests/data/provider_options.json. A provider's options are plain strings of its library; of TensorRT's all that
begin with ``trt_``, of CUDA's those that its documentation names, where the library has them.
"""

from __future__ import annotations

import json
import re
import sys
import zipfile
from pathlib import Path
from typing import Final

OPTIONS_FILE: Final = Path(__file__).parent / "data" / "provider_options.json"
_LIBRARY: Final = "onnxruntime/capi/libonnxruntime_providers_{}.so"
# https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html#configuration-options
_CUDA_DOCUMENTED: Final = (
    "arena_extend_strategy",
    "cudnn_conv1d_pad_to_nc1d",
    "cudnn_conv_algo_search",
    "cudnn_conv_use_max_workspace",
    "device_id",
    "do_copy_in_default_stream",
    "enable_cuda_graph",
    "enable_skip_layer_norm_strict_mode",
    "fuse_conv_bias",
    "gpu_mem_limit",
    "prefer_nhwc",
    "sdpa_kernel",
    "tunable_op_enable",
    "tunable_op_max_tuning_duration_ms",
    "tunable_op_tuning_enable",
    "use_ep_level_unified_stream",
    "use_tf32",
    "user_compute_stream",
)


def read_options(wheel: Path) -> dict[str, object]:
    """The options of both providers, and where they were read."""
    with zipfile.ZipFile(wheel) as archive:
        tensorrt, cuda = (archive.read(_LIBRARY.format(name)) for name in ("tensorrt", "cuda"))
    names = set(re.findall(rb"(?<=\0)trt_[a-z0-9_]+(?=\0)", tensorrt))
    return {
        "source": wheel.name,
        "TensorrtExecutionProvider": sorted(name.decode() for name in names),
        "CUDAExecutionProvider": [name for name in _CUDA_DOCUMENTED if b"\0%b\0" % name.encode() in cuda],
    }


if __name__ == "__main__":
    OPTIONS_FILE.write_text(json.dumps(read_options(Path(sys.argv[1])), indent=1) + "\n", encoding="utf-8")
