"""Weights of a Hugging Face folder: safetensors, or the older pytorch_model.bin, whole or in shards."""

from __future__ import annotations

import json
import pickle
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from export.errors import ExportError
from export.tensors import to_float32

if TYPE_CHECKING:
    from pathlib import Path

    from export.tensors import Float32Array, Shapes

_SAFETENSORS_DTYPES: Final = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class _Entry(NamedTuple):
    shard: Path
    stored_name: str
    shape: tuple[int, ...]


class SafetensorsWeights:
    """Tensors of one or more ``.safetensors`` files, read one at a time.

    Attributes:
        stored_dtype: the element type of the first matrix, such as "bfloat16".
    """

    def __init__(self, shards: list[Path], prefix: str) -> None:
        try:
            from safetensors import safe_open
        except ImportError:
            raise ExportError("reading safetensors needs a package: pip install 'edge-llm[export-lite]'") from None
        self._open = safe_open
        self._entries: dict[str, _Entry] = {}
        self.stored_dtype = ""
        for shard in shards:
            try:
                self._index(shard, prefix)
            except ExportError:
                raise
            except Exception as error:
                raise ExportError(f"{shard} is truncated or damaged ({error}): download it again") from None

    @property
    def shapes(self) -> Shapes:
        """Shape of every tensor there is."""
        return {name: entry.shape for name, entry in self._entries.items()}

    def read(self, name: str) -> Float32Array:
        """One tensor as float32. Raises ``ExportError`` if it cannot be read."""
        entry = self._entries[name]
        try:
            with self._open(str(entry.shard), "np") as stream:
                array = stream.get_tensor(entry.stored_name)
        except Exception as error:
            raise ExportError(f"cannot read {name!r} from {entry.shard}: {error}") from None
        return to_float32(array, name, entry.shard.name)

    def _index(self, shard: Path, prefix: str) -> None:
        with self._open(str(shard), "np") as stream:
            for stored_name in stream.keys():  # noqa: SIM118 - not a mapping
                part = stream.get_slice(stored_name)
                dtype, shape = part.get_dtype(), tuple(part.get_shape())
                name = stored_name.removeprefix(prefix)
                if len(shape) == 2:
                    if dtype not in _SAFETENSORS_DTYPES:
                        raise ExportError(
                            f"{shard}: weight {stored_name!r} is of type {dtype}, which is not supported, only "
                            f"{', '.join(_SAFETENSORS_DTYPES)}"
                        )
                    self.stored_dtype = self.stored_dtype or _SAFETENSORS_DTYPES[dtype]
                self._entries[name] = _Entry(shard, stored_name, shape)


class TorchWeights:
    """Tensors of ``pytorch_model.bin``, loaded without running any code that the file may hold.

    Attributes:
        stored_dtype: the element type of the first matrix, such as "float16".
    """

    def __init__(self, shards: list[Path], prefix: str) -> None:
        try:
            import torch
        except ImportError:
            raise ExportError(
                "pytorch_model.bin needs torch: pip install torch, or save the model as safetensors"
            ) from None
        self._tensors: dict[str, Any] = {}
        for shard in shards:
            try:
                loaded = torch.load(shard, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError:
                # torch's own message advises to load it all the same, which would run whatever is in it.
                raise ExportError(
                    f"{shard} is not plain weights, and could run code: get the model as safetensors"
                ) from None
            except Exception as error:
                first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise ExportError(f"{shard} is truncated, damaged or not plain weights ({first_line})") from None
            if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
                raise ExportError(f"{shard} does not hold a state dict of tensors")
            self._tensors |= {name.removeprefix(prefix): value for name, value in loaded.items()}
        matrices = [tensor for tensor in self._tensors.values() if tensor.ndim == 2]
        self.stored_dtype = str(matrices[0].dtype).removeprefix("torch.") if matrices else ""

    @property
    def shapes(self) -> Shapes:
        """Shape of every tensor there is."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Float32Array:
        """One tensor as float32."""
        return to_float32(self._tensors[name].float().numpy(), name, "pytorch_model.bin")


def open_weights(folder: Path, prefix: str) -> SafetensorsWeights | TorchWeights:
    """The folder's weights, safetensors first.

    Args:
        folder: a Hugging Face model folder.
        prefix: taken off the names of the tensors that have it.

    Raises:
        ExportError: there are none, or a shard is missing, truncated or damaged.
    """
    for stem, reader in (("model.safetensors", SafetensorsWeights), ("pytorch_model.bin", TorchWeights)):
        if (folder / stem).is_file():
            return reader([folder / stem], prefix)
        if (folder / f"{stem}.index.json").is_file():
            return reader(_shards(folder / f"{stem}.index.json"), prefix)
    raise ExportError(
        f"{folder} has no weights: model.safetensors (or its index), or pytorch_model.bin, must be beside config.json"
    )


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ExportError(f"{index} is malformed ({error}): download it again") from None
    for name in names:
        # An index names its neighbours; anything else is not one that save_pretrained wrote.
        if not isinstance(name, str) or "/" in name or "\\" in name:
            raise ExportError(f"{index} names the file {name!r}, which is not beside it")
        if not (index.parent / name).is_file():
            raise ExportError(f"{index.parent} lacks {name}, which {index.name} names: download the checkpoint again")
    return [index.parent / name for name in names]
