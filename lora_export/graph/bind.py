"""Write finished weightless graphs with their weights: one tensor at a time, straight into external data.

No tensor outlives its turn: a weight is made (read, folded, cast, transposed or concatenated), written, hashed and
dropped, so the peak is the largest tensor and what its making needs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from lora_export.base.recipe import Recipe
from lora_export.contract import AdapterInput, StoredDefault, data_file, graph_file
from lora_export.errors import InputRefused
from lora_export.graph.sites import NAME_SCOPES
from lora_export.graph.unbound import unbound

# Pages on every platform that serves; ONNX Runtime maps external data when tensors start on one.
_ALIGNMENT = 4096
_CHUNK_BYTES = 1 << 24
# Below this a constant stays in the graph, where ONNX Runtime's shape inference reads it.
_INLINE_BYTES = 1024


@dataclass(frozen=True)
class WrittenGraphs:
    """What a write produced: sha256 by file name, total bytes, and each graph's adapter inputs with their defaults."""

    sha256: dict[str, str]
    n_bytes: int
    adapter_inputs: dict[str, tuple[AdapterInput, ...]]


def write_graphs(
    models: Mapping[str, ir.Model],
    folder: Path,
    make_weight: Callable[[Recipe, str], np.ndarray],
    *,
    adapter_inputs: Mapping[str, Sequence[AdapterInput]],
    on_weight: Callable[[str, int], None] = lambda name, n_bytes: None,
    required: bool = False,
) -> WrittenGraphs:
    """Bind and write the graphs of an export into `folder`; graphs that share a data file share equal weights in it.

    Args:
        models: By stem. Consumed: their initializers are external tensors afterwards.
        make_weight: Makes a weight from its recipe in a dtype (NumPy's name), C-contiguous.
        adapter_inputs: Those of each graph; a replaced Linear's default is stored `[1, …]`.
        on_weight: Called after each weight with its name and size in bytes, for progress.
        required: Adapter inputs are without defaults in the graph; what is stored of them is in the data file only.

    Raises:
        OSError: The disk is full or the folder cannot be written.
    """
    sha256, n_bytes = {}, 0
    described: dict[str, tuple[AdapterInput, ...]] = {}
    for data_name in dict.fromkeys(map(data_file, models)):
        sharing = [graph for graph in models if data_file(graph) == data_name]
        with _HashingWriter(folder / data_name) as writer:
            stored: dict[tuple, StoredDefault] = {}
            for graph in sharing:
                binding = _Binding(folder, data_name, writer, make_weight, on_weight, stored)
                described[graph] = binding.bind(models[graph].graph, adapter_inputs[graph])
                if required:
                    _drop_defaults(models[graph].graph, described[graph])
        sha256[data_name] = writer.sha256
        n_bytes += writer.n_bytes
    for graph, model in models.items():
        _drop_build_metadata(model)
        path = folder / graph_file(graph)
        ir.save(model, path)
        graph_bytes = path.read_bytes()
        sha256[path.name] = hashlib.sha256(graph_bytes).hexdigest()
        n_bytes += len(graph_bytes)
    return WrittenGraphs(sha256, n_bytes, described)


@dataclass(frozen=True)
class _Binding:
    """One data file being written, and what it holds so far: tensors by how they are made, or by their bytes."""

    folder: Path
    data_name: str
    writer: _HashingWriter
    make_weight: Callable[[Recipe, str], np.ndarray]
    on_weight: Callable[[str, int], None]
    stored: dict[tuple, StoredDefault]

    def bind(self, graph: ir.Graph, adapter_inputs: Sequence[AdapterInput]) -> tuple[AdapterInput, ...]:
        """Give every weight of `graph` its place in the file; the adapter inputs with theirs."""
        _order_initializers(graph)
        by_name = {entry.name: entry for entry in adapter_inputs}
        recipes = {value.name: recipe for value, recipe in unbound(graph)}
        for value in list(graph.initializers.values()):
            recipe, is_default = recipes.get(value.name), value.name in by_name
            if recipe is None and value.const_value.nbytes < _INLINE_BYTES:
                if isinstance(value.const_value, ir.ExternalTensor):  # of a given graph, in its own data file
                    value.const_value = ir.tensor(value.const_value.numpy().copy(), name=value.name)
                continue  # shapes and other small constants stay inline
            key = (recipe or _digest(value.const_value), value.dtype, is_default)
            if key not in self.stored:
                self.stored[key] = self._write(value, recipe, is_default=is_default)
            stored = self.stored[key]
            if is_default:
                by_name[value.name] = replace(by_name[value.name], default=stored)
            value.const_value = ir.ExternalTensor(
                self.data_name,
                stored.offset,
                stored.length,
                value.dtype,
                shape=ir.Shape(stored.shape),
                name=value.name,
                base_dir=str(self.folder),
            )
        return tuple(by_name.values())

    def _write(self, value: ir.Value, recipe: Recipe | None, *, is_default: bool) -> StoredDefault:
        array = value.const_value.numpy() if recipe is None else self.make_weight(recipe, str(value.dtype.numpy()))
        _require_size(value, array)
        if is_default:
            array = array.reshape(1, *array.shape) if array.ndim == 2 else array.reshape(1, 1, -1)
        stored = StoredDefault(array.shape, self.writer.write(array), array.nbytes)
        self.on_weight(value.name, array.nbytes)
        return stored


def _drop_defaults(graph: ir.Graph, adapter_inputs: Sequence[AdapterInput]) -> None:
    for entry in adapter_inputs:
        graph.initializers.pop(entry.name).const_value = None


def _require_size(value: ir.Value, array: np.ndarray) -> None:
    """Refuse numbers of another dtype or shape than the graph says: their bytes would be read as other numbers.

    Raises:
        InputRefused: The bytes are not dtype × shape.
    """
    if value.shape is None or not all(isinstance(dim, int) for dim in value.shape):
        return
    shape, dtype = [int(dim) for dim in value.shape], value.dtype.numpy()
    if array.nbytes != math.prod(shape) * dtype.itemsize:
        raise InputRefused(
            "A weight of the base is not of the size that the graph has for it",
            where=value.name,
            expected=f"{shape} in {dtype}, {math.prod(shape) * dtype.itemsize} bytes",
            found=f"{list(array.shape)} in {array.dtype}, {array.nbytes} bytes",
            next_step="fetch the base again; its config.json and its weights are of different models",
        )


def _digest(tensor: ir.TensorProtocol) -> tuple[tuple[int, ...], bytes]:
    return tuple(tensor.shape), hashlib.sha256(tensor.tobytes()).digest()


def _order_initializers(graph: ir.Graph) -> None:
    """By name: a graph that went through the cache's file has its unbound initializers in another order."""
    ordered = sorted(graph.initializers.items())
    graph.initializers.clear()
    graph.initializers.update(ordered)


def _drop_build_metadata(model: ir.Model) -> None:
    """Remove what only the export needed: a served file does not carry the exporter's stack traces and paths."""
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for node in model.graph.all_nodes():
        for key in [key for key in node.metadata_props if key != NAME_SCOPES]:
            del node.metadata_props[key]
        node.doc_string = None


class _HashingWriter:
    """Appends aligned arrays to a file; the sha256 of the whole is computed on another thread meanwhile."""

    def __init__(self, path: Path) -> None:
        self._path, self._digest, self.n_bytes = path, hashlib.sha256(), 0
        self._hashing = ThreadPoolExecutor(max_workers=1)
        self._hashed: Future[None] | None = None

    def __enter__(self) -> _HashingWriter:
        self._file = self._path.open("wb")
        return self

    def __exit__(self, *exception: object) -> None:
        self._hashing.shutdown()
        self._file.close()

    @property
    def sha256(self) -> str:
        if self._hashed is not None:
            self._hashed.result()
        return self._digest.hexdigest()

    def next_offset(self) -> int:
        return -(-self.n_bytes // _ALIGNMENT) * _ALIGNMENT

    def write(self, array: np.ndarray) -> int:
        """Append `array`, aligned; its offset in bytes."""
        offset = self.next_offset()
        self._put(memoryview(bytes(offset - self.n_bytes)))
        self._put(memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8)))
        return offset

    def _put(self, data: memoryview) -> None:
        if self._hashed is not None:
            self._hashed.result()  # one tensor in flight: memory stays bounded by two tensors
        self._hashed = self._hashing.submit(self._digest.update, data)
        for start in range(0, len(data), _CHUNK_BYTES):
            self._file.write(data[start : start + _CHUNK_BYTES])
        self.n_bytes += len(data)
