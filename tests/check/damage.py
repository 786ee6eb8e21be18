"""Damage to an exported folder, one place at a time, as a converter with a bug would have written it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from lora_export.artifact import sha256_of

Tensors = dict[str, np.ndarray]


def adapter(folder: Path, file: str, change: Callable[[Tensors], None]) -> None:
    """Rewrite an adapter's file and its hash, as if the packing itself had been wrong."""
    path = folder / "adapters" / file
    tensors = tensors_of(path)
    change(tensors)
    written = ort.AdapterFormat()
    values = {key: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(v)) for key, v in tensors.items()}
    written.set_parameters(values)
    written.export_adapter(str(path))
    manifest = json.loads((folder / "lora_export.json").read_text())
    manifest["files"][f"adapters/{file}"] = sha256_of(path)
    (folder / "lora_export.json").write_text(json.dumps(manifest))


def drop(module: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"]

    return change


def transpose_a(module: str) -> Callable[[Tensors], None]:
    """A read in the other order, its shape kept."""

    def change(tensors: Tensors) -> None:
        a = tensors[f"{module}.lora_A.weight"]
        tensors[f"{module}.lora_A.weight"] = a.transpose(0, 2, 1).reshape(a.shape)

    return change


def graph(folder: Path, change: Callable[[onnx.ModelProto], None], stem: str = "model") -> None:
    """Rewrite a graph file; its weights stay where they are."""
    path = folder / f"{stem}.onnx"
    model = onnx.load(path, load_external_data=False)
    change(model)
    onnx.save(model, path)


def producer(model: onnx.ModelProto, value: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if value in node.output)


def reader(model: onnx.ModelProto, value: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if value in node.input)


def stored(folder: Path, name: str, change: Callable[[np.ndarray], np.ndarray], stem: str = "model") -> None:
    """Change a weight in place, in the data file or, if it is small, in the graph itself."""
    model = onnx.load(folder / f"{stem}.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == name)
    if not tensor.external_data:
        array = change(onnx.numpy_helper.to_array(tensor).copy())
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))
        onnx.save(model, folder / f"{stem}.onnx")
        return
    place = {entry.key: entry.value for entry in tensor.external_data}
    offset, length = int(place["offset"]), int(place["length"])
    file = folder / place["location"]
    data = bytearray(file.read_bytes())
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    array = np.frombuffer(bytes(data[offset : offset + length]), dtype).reshape(tuple(tensor.dims))
    data[offset : offset + length] = change(array.copy()).astype(dtype).tobytes()
    file.write_bytes(bytes(data))


def weight_of(folder: Path, name: str, stem: str = "model") -> np.ndarray:
    model = onnx.load(folder / f"{stem}.onnx")
    return onnx.numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name)).copy()


def tensors_of(file: Path) -> Tensors:
    """An adapter's tensors by input name."""
    read = ort.AdapterFormat.read_adapter(str(file))
    return {key: value.numpy().copy() for key, value in read.get_parameters().items()}
