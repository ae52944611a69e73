"""Static int8 for TensorRT: both inputs of each block's products are quantised, between nodes that say so.

optimum's ``ORTQuantizer`` computes the scales and makes the nodes, with its own settings for TensorRT: symmetric int8,
a scale for each output of a weight and one for an activation, a pair of its own for each input, weights stored in
float16. The ranges come from here: its ``fit`` knows no cache, whose past a second chunk needs. Two things are changed.
It quantises the products' outputs, too, which doubled the mean KL of the first model tried; those pairs are left out.
And where an output's weights are so small that float16 has no normal number for their scale, it sets that to 1, which
makes zeros of them all; here it becomes the smallest normal number.

Products that lose too much stay in float16, and the graph's metadata lists them with what each alone would lose.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from export.calibrate import measure_largest
from export.console import say
from export.errors import ExportError
from export.graph.check import check_graph
from export.graph.check_qdq import UNQUANTIZED_KEY
from export.verify import Comparison, compare, open_judged
from export.verify_static import static_paths

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from numpy.typing import NDArray

    from edge_llm.bundle.manifest import ModelDims
    from edge_llm.engine.runner import ModelRunner
    from export.graph.weights import WeightFormat

_LARGEST: Final = 127
# What the calibration text may lose, of what is allowed on the text that the graph is judged on.
_SHARE: Final = 0.5
# Enough for the order of the products; each costs a run of its own.
_TOKENS_ALONE: Final = 512
_TOKENS_TOGETHER: Final = 4096


class _Pairs(NamedTuple):
    """What quantises one product: nodes in their order, their constants, and what the product then reads."""

    nodes: Sequence[onnx.NodeProto]
    constants: Sequence[TensorProto]
    inputs: Sequence[str]


class _Files(NamedTuple):
    """The graphs of a static form as they were built, by their paths, and what may be put before each product."""

    models: Mapping[Path, onnx.ModelProto]
    pairs: Mapping[str, _Pairs]

    def write(self, quantized: Collection[str], kept: Mapping[str, Comparison]) -> None:
        """Write both graphs with the named products quantised, and the list of those that are not."""
        for path, model in self.models.items():
            written = onnx.ModelProto()
            written.CopyFrom(model)
            del written.graph.node[:]
            constants = {}
            for node in model.graph.node:
                if node.name in quantized:
                    pairs = self.pairs[node.name]
                    written.graph.node.extend(pairs.nodes)
                    constants.update({tensor.name: tensor for tensor in pairs.constants})
                    written.graph.node.add().CopyFrom(node)
                    written.graph.node[-1].input[:] = pairs.inputs
                else:
                    written.graph.node.add().CopyFrom(node)
            written.graph.initializer.extend(constants.values())
            if kept:
                listed = {name: _figures(loss) for name, loss in kept.items()}
                written.metadata_props.add(key=UNQUANTIZED_KEY, value=json.dumps(listed))
            path.write_bytes(written.SerializeToString(deterministic=True))


def quantize_products(
    graph_path: Path,
    dims: ModelDims,
    weights: WeightFormat,
    windows: Sequence[Sequence[int]],
    reference: ModelRunner,
    max_perplexity_ratio: float,
) -> None:
    """Quantise a static form in place, as many of its products as the limit allows.

    Args:
        graph_path: the graph that decodes, in float16; the one for prefill lies beside it.
        dims: the model's shape.
        weights: the target.
        windows: token ids of texts to calibrate and choose with, each within the context.
        reference: the ``cpu-fp32`` graph of the same weights.
        max_perplexity_ratio: against the reference, on another text; on these, half the loss is aimed at.

    Raises:
        ExportError: optimum is not there, the loss is too large however few products are quantised, or a graph breaks
            one of its rules.
    """
    paths = static_paths(graph_path)
    models = {path: onnx.load(str(path), load_external_data=False) for path in paths}
    files = _Files(models, _make_pairs(paths.prefill, dims, windows))

    def judge(names: Sequence[str], tokens: int, what: str) -> Comparison:
        files.write(names, {})
        runner = open_judged(graph_path, dims, weights)
        return compare(runner, reference, _beginning(windows, tokens), f"{weights.target}, {what}")

    kept = _choose(list(files.pairs), judge, 1 + _SHARE * (max_perplexity_ratio - 1))
    if len(kept) == len(files.pairs):
        raise ExportError(
            f"{weights.target}: no product of this model can be in int8 within a perplexity ratio of "
            f"{max_perplexity_ratio:g}: leave it out of --target, or raise --max-tensorrt-int8-perplexity-ratio"
        )
    files.write(files.pairs.keys() - kept.keys(), kept)
    say(f"{weights.target}: {len(files.pairs) - len(kept)} of {len(files.pairs)} products in int8")
    for path in paths:
        onnx.checker.check_model(str(path))
        check_graph(onnx.load(str(path), load_external_data=False), weights, dims)


def _choose(
    names: Sequence[str], judge: Callable[[Sequence[str], int, str], Comparison], limit: float
) -> dict[str, Comparison]:
    """The fewest products without which the loss is within the limit, the worst first, with what each alone loses."""
    if judge(names, _TOKENS_TOGETHER, "every product").perplexity_ratio <= limit:
        return {}
    alone = {name: judge([name], _TOKENS_ALONE, name) for name in names}
    ranked = sorted(names, key=lambda name: -alone[name].mean_kl)
    fewest, most = 1, len(ranked)
    while fewest < most:
        middle = (fewest + most) // 2
        ratio = judge(ranked[middle:], _TOKENS_TOGETHER, f"all but {middle} products").perplexity_ratio
        fewest, most = (fewest, middle) if ratio <= limit else (middle + 1, most)
    return {name: alone[name] for name in ranked[:most]}


def _make_pairs(graph_path: Path, dims: ModelDims, windows: Sequence[Sequence[int]]) -> dict[str, _Pairs]:
    """What optimum puts before each product's inputs, by the product's name."""
    try:
        from onnxruntime.quantization import CalibrationMethod
        from onnxruntime.quantization.calibrate import TensorsData
        from optimum.onnxruntime import AutoQuantizationConfig, ORTQuantizer
        from transformers import PretrainedConfig
    except ImportError as error:
        raise ExportError(f"tensorrt-int8 needs optimum ({error}): pip install 'edge-llm[export]'") from None
    largest = measure_largest(graph_path, dims, windows, "calibrating int8")
    bounds = {name: np.array(value, np.float16) for name, value in largest.items()}
    ranges = TensorsData(CalibrationMethod.MinMax, {name: (-bound, bound) for name, bound in bounds.items()})
    settings = AutoQuantizationConfig.tensorrt(per_channel=True, operators_to_quantize=["MatMul"])
    # A whole copy of the weights: on the disk that the export has asked for room on.
    with tempfile.TemporaryDirectory(dir=graph_path.parent) as folder:
        # A configuration of its own, since there is none to look for beside the graph.
        quantizer = ORTQuantizer(graph_path, config=PretrainedConfig())
        quantizer.quantize(settings, folder, calibration_tensors_range=ranges, use_external_data_format=True)
        quantized = onnx.load(str(Path(folder) / f"{graph_path.stem}_quantized.onnx"))
    producers = {node.output[0]: node for node in quantized.graph.node}
    tensors = {tensor.name: tensor for tensor in quantized.graph.initializer}
    pairs = {}
    for product in quantized.graph.node:
        if product.op_type == "MatMul":
            undone = [producers[name] for name in product.input]
            nodes = [node for one in undone for node in (producers[one.input[0]], one)]
            constants = {name: numpy_helper.to_array(tensors[name]) for node in nodes for name in node.input[1:]}
            source, scale = producers[undone[1].input[0]].input[:2]
            constants[scale] = _kept_small(constants[scale], numpy_helper.to_array(tensors[source]))
            stored = [numpy_helper.from_array(array, name) for name, array in constants.items()]
            pairs[product.name] = _Pairs(nodes, stored, list(product.input))
    return pairs


def _kept_small(scales: NDArray[Any], weight: NDArray[Any]) -> NDArray[Any]:
    """The scales ``(N,)`` of ``weight (K, N)``, of an output with tiny weights the smallest normal number."""
    smallest = np.finfo(scales.dtype).tiny
    needed = np.abs(weight).max(axis=0).astype(np.float32) / _LARGEST
    return np.where((needed > 0) & (needed < smallest), smallest, scales)


def _beginning(windows: Sequence[Sequence[int]], tokens: int) -> list[Sequence[int]]:
    """The first of the texts, together not much longer than so many tokens."""
    chosen: list[Sequence[int]] = []
    for window in windows:
        if sum(map(len, chosen)) >= tokens:
            break
        chosen.append(window)
    return chosen


def _figures(loss: Comparison) -> dict[str, float]:
    return {"mean_kl": round(loss.mean_kl, 6), "perplexity_ratio": round(loss.perplexity_ratio, 5)}
