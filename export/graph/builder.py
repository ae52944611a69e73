"""A graph under construction: nodes in memory, large weights streamed to one external data file as they come."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.errors import ExportError
from export.graph.io import declare_io, declare_static_io, prefill_chunk

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

    from numpy.typing import NDArray

    from edge_llm.bundle.manifest import ModelDims
    from export.graph.io import DeclaredIO
    from export.graph.weights import WeightFormat

CONTRIB: Final = "com.microsoft"
MODEL_FILE: Final = "model.onnx"
PREFILL_FILE: Final = "prefill.onnx"
DATA_FILE: Final = "model.onnx.data"
# Smaller tensors (shapes, norms of a tiny model) stay inside model.onnx, where shape inference can see them.
_INLINE_BYTES: Final = 1024
# Large tensors start on a page, so that the runtime can map the file into memory instead of copying it.
_PAGE_BYTES: Final = 4096
# ONNX Runtime registers these in the default domain, where the ONNX checker does not know them.
_UNCHECKED_OPS: Final = frozenset({"SimplifiedLayerNormalization"})
_DESCRIPTION: Final = (
    "One step of a decoder with a static key-value cache, appended in place; inputs and outputs are described in "
    "edge_llm/bundle/graph_io.py."
)
_STATIC_DESCRIPTION: Final = (
    "One decode step, or one prefill chunk, of a decoder with a static key-value cache and only static shapes; inputs "
    "and outputs are described in edge_llm/bundle/graph_io.py."
)


class GraphBuilder:
    """Collects nodes and weights of one graph; use it as a context manager, then ``save``.

    Args:
        folder: where model.onnx and model.onnx.data go; it exists.
        weights: how weight matrices are stored.
        on_write: told the number of bytes after each write, for a progress bar.
    """

    def __init__(self, folder: Path, weights: WeightFormat, on_write: Callable[[int], object] | None = None) -> None:
        self.folder = folder
        self.weights = weights
        self._on_write = on_write
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._data = (folder / DATA_FILE).open("wb")

    def __enter__(self) -> GraphBuilder:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._data.close()

    def node(self, op_type: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> str:
        """Append an operator of the default domain; returns its first output's name."""
        self._nodes.append(helper.make_node(op_type, inputs, outputs, name=outputs[0], **attributes))
        return outputs[0]

    def contrib(self, op_type: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> str:
        """Append an operator of ``com.microsoft``; returns its first output's name."""
        return self.node(op_type, inputs, outputs, domain=CONTRIB, **attributes)

    def initializer(self, name: str, array: NDArray[Any]) -> str:
        """Add a constant tensor, a float32 one in the graph's own type; returns its name.

        Raises:
            ExportError: a value is too large for that type.
        """
        assert name not in self._initializers, f"initializer {name} added twice"
        return self._store(name, self._in_own_type(name, array) if array.dtype == np.float32 else array)

    def constant(self, name: str, array: NDArray[Any]) -> str:
        """Add a constant tensor of its own type, which several nodes may ask for by the same name; returns the name."""
        return name if name in self._initializers else self._store(name, array)

    def number(self, name: str, value: float, float_type: str = "float32") -> str:
        """Add a constant of one value, in float32 unless told otherwise; see ``constant``."""
        return self.constant(name, np.array([value], float_type))

    def shape(self, *sizes: int) -> str:
        """A shape for ``Reshape``, or sizes for ``Split``: 0 keeps a dimension, -1 is what is left."""
        return self.constant(f"shape.{'x'.join(map(str, sizes))}", np.array(sizes, np.int64))

    def _store(self, name: str, array: NDArray[Any]) -> str:
        array = np.ascontiguousarray(array)
        if array.nbytes < _INLINE_BYTES:
            self._initializers[name] = numpy_helper.from_array(array, name)
            return name
        offset = self._data.tell()
        padding = -offset % _PAGE_BYTES
        self._data.write(bytes(padding))
        self._data.write(array.data)
        tensor = TensorProto(name=name, dims=array.shape, data_location=TensorProto.EXTERNAL)
        tensor.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
        for key, value in {"location": DATA_FILE, "offset": offset + padding, "length": array.nbytes}.items():
            tensor.external_data.add(key=key, value=str(value))
        self._initializers[name] = tensor
        if self._on_write is not None:
            self._on_write(array.nbytes)
        return name

    def _in_own_type(self, name: str, array: NDArray[np.float32]) -> NDArray[np.floating]:
        if self.weights.float_type == "float32":
            return array
        with np.errstate(over="ignore"):
            converted: NDArray[np.floating] = array.astype(self.weights.float_type)
        if not np.isfinite(converted).all():
            raise ExportError(
                f"{self.weights.target}: weight {name!r} has values up to {np.abs(array).max():.3g}, too large for "
                f"{self.weights.float_type}: leave this target out"
            )
        return converted

    def save(self, dims: ModelDims, *, takes_positions: bool, metadata: Mapping[str, str]) -> Path:
        """Write model.onnx, and prefill.onnx for a static form, beside the data file that they share.

        Args:
            dims: the model's shape.
            takes_positions: whether the graph has the ``position_ids`` input; a static one always has.
            metadata: entries for the models' ``metadata_props``.

        Returns:
            The path of model.onnx.
        """
        self._data.close()
        model_path = self.folder / MODEL_FILE
        if not self.weights.is_static:
            self._write(model_path, dims, declare_io(dims, self.weights, takes_positions=takes_positions), metadata)
            return model_path
        # No node depends on the number of tokens, so that two declarations of the same nodes are two static graphs.
        for path, tokens in ((model_path, 1), (self.folder / PREFILL_FILE, prefill_chunk(dims))):
            self._write(path, dims, declare_static_io(dims, self.weights, tokens), metadata)
        return model_path

    def _write(self, path: Path, dims: ModelDims, declared: DeclaredIO, metadata: Mapping[str, str]) -> None:
        """Write one model after the ONNX checker has passed it."""
        graph = helper.make_graph(
            self._nodes,
            f"{dims.architecture}-{self.weights.target}",
            declared.inputs,
            declared.outputs,
            list(self._initializers.values()),
            doc_string=_STATIC_DESCRIPTION if self.weights.is_static else _DESCRIPTION,
        )
        kernels = self.weights.kernels
        opsets = [helper.make_opsetid("", kernels.opset)]
        if not self.weights.is_static:
            opsets.append(helper.make_opsetid(CONTRIB, 1))
        model = helper.make_model(graph, opset_imports=opsets, ir_version=kernels.ir_version, producer_name="edge-llm")
        helper.set_model_props(model, dict(metadata))
        _check(model, path)
        path.write_bytes(model.SerializeToString(deterministic=True))


def _check(model: onnx.ModelProto, path: Path) -> None:
    """Run the ONNX checker on a copy that calls ONNX Runtime's own operators by their contrib domain."""
    checked = onnx.ModelProto()
    checked.CopyFrom(model)
    for node in checked.graph.node:
        if node.op_type in _UNCHECKED_OPS:
            node.domain = CONTRIB
    # The checker follows external data only from a file.
    path.write_bytes(checked.SerializeToString())
    onnx.checker.check_model(str(path))
