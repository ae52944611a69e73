"""A checkpoint in a peer's format, by its own converter: ``python -m benchmarks.files.peers PEER CHECKPOINT OUT``."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Final

from edge_llm.device.cpu import cpu_features


def convert_for_ctranslate2(checkpoint: Path, out: Path) -> None:
    """int8 weights with a scale per row, CTranslate2's ``quantization="int8"``."""
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(checkpoint)).convert(str(out), quantization="int8")


def convert_for_optimum(checkpoint: Path, out: Path) -> None:
    """ONNX export with a key-value cache, then dynamic int8 quantisation with the preset for this processor."""
    from optimum.onnxruntime import ORTModelForCausalLM, ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    features = cpu_features().split()
    if "avx512_vnni" in features:
        quantization = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=False)
    elif "avx2" in features:
        quantization = AutoQuantizationConfig.avx2(is_static=False, per_channel=False)
    else:
        quantization = AutoQuantizationConfig.arm64(is_static=False, per_channel=False)
    with tempfile.TemporaryDirectory(dir=out.parent) as exported:
        ORTModelForCausalLM.from_pretrained(checkpoint, export=True, use_cache=True).save_pretrained(exported)
        ORTQuantizer.from_pretrained(exported, file_name="model.onnx").quantize(
            save_dir=out, quantization_config=quantization
        )


CONVERTERS: Final = {"ctranslate2": convert_for_ctranslate2, "optimum-onnx": convert_for_optimum}

if __name__ == "__main__":
    CONVERTERS[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
