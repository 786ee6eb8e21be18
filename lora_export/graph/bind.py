"""Write a finished weightless graph with its weights: one tensor at a time, straight into external data.

No tensor outlives its turn: a weight is made (read, folded, cast, transposed or concatenated), written, hashed and
dropped, so the peak is the largest tensor and what its making needs.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from lora_export.contract import AdapterInput, StoredDefault
from lora_export.graph.sites import NAME_SCOPES
from lora_export.graph.unbound import unbound
from lora_export.recipe import Recipe

# Pages on every platform that serves; ONNX Runtime maps external data when tensors start on one.
_ALIGNMENT = 4096
_CHUNK_BYTES = 1 << 24
# Below this a constant stays in the graph, where ONNX Runtime's shape inference reads it.
_INLINE_BYTES = 1024


@dataclass(frozen=True)
class WrittenGraph:
    """What a write produced: sha256 by file name, total bytes, and the adapter inputs with their stored defaults."""

    sha256: dict[str, str]
    n_bytes: int
    adapter_inputs: tuple[AdapterInput, ...]


def write_graph(
    model: ir.Model,
    folder: Path,
    make_weight: Callable[[Recipe, str], np.ndarray],
    adapter_inputs: Iterable[AdapterInput] = (),
    on_weight: Callable[[str, int], None] = lambda name, n_bytes: None,
) -> WrittenGraph:
    """Bind and write `model` as `folder/model.onnx` and `folder/model.onnx.data`.

    Args:
        model: Consumed: its initializers are external tensors afterwards.
        make_weight: Makes a weight from its recipe in a dtype (NumPy's name), C-contiguous.
        adapter_inputs: Those of a dynamic graph; a replaced Linear's default is stored `[1, …]`.
        on_weight: Called after each weight with its name and size in bytes, for progress.

    Raises:
        OSError: The disk is full or the folder cannot be written.
    """
    data_name = "model.onnx.data"
    _order_initializers(model.graph)
    by_name = {entry.name: entry for entry in adapter_inputs}
    with _HashingWriter(folder / data_name) as writer:
        for value, array in _large_weights(model.graph, make_weight):
            if value.name in by_name:
                array = array.reshape(1, *array.shape) if array.ndim == 2 else array.reshape(1, 1, -1)
                stored = StoredDefault(array.shape, writer.next_offset(), array.nbytes)
                by_name[value.name] = replace(by_name[value.name], default=stored)
            offset = writer.write(array)
            value.const_value = ir.ExternalTensor(
                data_name,
                offset,
                array.nbytes,
                value.dtype,
                shape=ir.Shape(array.shape),
                name=value.name,
                base_dir=str(folder),
            )
            on_weight(value.name, array.nbytes)
            del array
    _drop_build_metadata(model)
    ir.save(model, folder / "model.onnx")
    graph_bytes = (folder / "model.onnx").read_bytes()
    return WrittenGraph(
        {"model.onnx": hashlib.sha256(graph_bytes).hexdigest(), data_name: writer.sha256},
        len(graph_bytes) + writer.n_bytes,
        tuple(by_name.values()),
    )


def _order_initializers(graph: ir.Graph) -> None:
    """By name: a graph that went through the cache's file has its unbound initializers in another order."""
    ordered = sorted(graph.initializers.items())
    graph.initializers.clear()
    graph.initializers.update(ordered)


def _large_weights(
    graph: ir.Graph, make_weight: Callable[[Recipe, str], np.ndarray]
) -> Iterator[tuple[ir.Value, np.ndarray]]:
    """The weights for external data, each made when it is asked for; shapes and other small constants stay inline."""
    recipes = {value.name: recipe for value, recipe in unbound(graph)}
    for value in list(graph.initializers.values()):
        if value.name in recipes:
            yield value, make_weight(recipes[value.name], str(value.dtype.numpy()))
        elif value.const_value.nbytes >= _INLINE_BYTES:
            yield value, value.const_value.numpy()


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
        # One tensor in flight: memory stays bounded by two tensors.
        self._queue: queue.Queue[memoryview | None] = queue.Queue(maxsize=1)
        self._thread = threading.Thread(target=self._hash, daemon=True)

    def __enter__(self) -> _HashingWriter:
        self._file = self._path.open("wb")
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._queue.put(None)
        self._thread.join()
        self._file.close()

    def _hash(self) -> None:
        while (chunk := self._queue.get()) is not None:
            self._digest.update(chunk)

    @property
    def sha256(self) -> str:
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
        self._queue.put(data)
        for start in range(0, len(data), _CHUNK_BYTES):
            self._file.write(data[start : start + _CHUNK_BYTES])
        self.n_bytes += len(data)
