"""The tensors and graphs of an exported folder, read and overwritten; the manifest's hashes are made to fit, as if the
export itself had been wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper

from lora_export.artifact import read_manifest, sha256_of, write_manifest
from lora_export.contract import data_file, graph_file

Arrays = Mapping[str, np.ndarray]
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)


def rehash(folder: Path, *files: str) -> None:
    """Let the manifest name `files` as they are now."""
    manifest = read_manifest(folder)
    found = {file: sha256_of(folder / file) for file in files}
    write_manifest(folder, replace(manifest, files=manifest.files | found))


def adapter_tensors(folder: Path, file: str) -> dict[str, np.ndarray]:
    """The tensors in an `.onnx_adapter` file, by input name."""
    adapter = ort.AdapterFormat.read_adapter(str(folder / file))
    return {key: value.numpy().copy() for key, value in adapter.get_parameters().items()}


def write_adapter_tensors(folder: Path, file: str, tensors: Arrays) -> None:
    """Overwrite an `.onnx_adapter` file."""
    adapter = ort.AdapterFormat()
    values = {name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value)) for name, value in tensors.items()}
    adapter.set_parameters(values)
    adapter.export_adapter(str(folder / file))
    rehash(folder, file)


def change_graph(folder: Path, graph: str, change: Callable[[onnx.ModelProto], bool]) -> bool:
    """Let `change` alter a graph in place; whether it did."""
    path = folder / graph_file(graph)
    model = onnx.load(path, load_external_data=False)
    if not change(model):
        return False
    path.write_bytes(model.SerializeToString())
    rehash(folder, path.name)
    return True


def change_weight(folder: Path, graph: str, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Overwrite one stored weight of a graph, by its name there."""

    def overwrite(model: onnx.ModelProto) -> bool:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
        _store(folder, graph, tensor, change(_stored(folder, graph, tensor)))
        return True

    change_graph(folder, graph, overwrite)


def replace_weights(folder: Path, changes: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    """Overwrite weights wherever they are stored in whatever layout: found by their values, not by names.

    Args:
        changes: What is stored and what is to be, `[out, in]` or of one axis; the stored tensor may be the transpose,
            and hold others beside it.

    Raises:
        LookupError: A weight is nowhere.
    """
    n_found = [0] * len(changes)

    def overwrite(model: onnx.ModelProto) -> bool:
        for tensor in model.graph.initializer:
            if tensor.data_type not in _FLOATS:
                continue
            old = _stored(folder, graph, tensor)
            new = old.copy()
            for index, (sound, wrong) in enumerate(changes):
                for old_part, new_part in _views(old, new, sound.ndim):
                    n_found[index] += _replace_blocks(old_part, new_part, sound, wrong)
            if not np.array_equal(old, new):
                _store(folder, graph, tensor, new)
        return True

    for graph in read_manifest(folder).graphs:
        change_graph(folder, graph, overwrite)
    missing = [sound.shape for (sound, _), n in zip(changes, n_found, strict=True) if n == 0]
    if missing:
        raise LookupError(f"weights of shapes {missing} are stored nowhere in {folder}")


def _views(old: np.ndarray, new: np.ndarray, n_axes: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Both arrays as matrices in which to look for one of `n_axes`, upright and transposed; a vector is a row."""
    if n_axes == 1 and old.size == max(old.shape, default=0):
        yield old.reshape(1, -1), new.reshape(1, -1)
    elif n_axes == 2 and old.ndim >= 2 and old.size == old.shape[-1] * old.shape[-2]:
        matrices = old.reshape(old.shape[-2:]), new.reshape(old.shape[-2:])
        yield matrices
        yield matrices[0].T, matrices[1].T


def _replace_blocks(old: np.ndarray, new: np.ndarray, sound: np.ndarray, wrong: np.ndarray) -> int:
    """Overwrite `sound` in `old` with `wrong` in `new` where it spans all columns or all rows; how often."""
    sound, wrong = np.atleast_2d(sound), np.atleast_2d(wrong)
    n_found = 0
    for by_column in (False, True):
        if by_column and sound.shape == old.shape:
            break  # found as rows already
        held, part = (old.T, sound.T) if by_column else (old, sound)
        if held.shape[1] != part.shape[1] or len(held) < len(part):
            continue
        into, values = (new.T, wrong.T) if by_column else (new, wrong)
        for start in np.flatnonzero(_alike(held[: len(held) - len(part) + 1], part[:1]).all(axis=1)):
            block = slice(start, start + len(part))
            if _alike(held[block], part).all():
                into[block] = values
                n_found += 1
    return n_found


def _alike(stored: np.ndarray, sound: np.ndarray) -> np.ndarray:
    """Equal up to a sum in another order and the rounding of the stored dtype."""
    eps = np.finfo(stored.dtype).eps
    return np.abs(stored.astype(np.float32) - sound) <= 2 * eps * np.abs(sound) + 1e-6


def _stored(folder: Path, graph: str, tensor: onnx.TensorProto) -> np.ndarray:
    where = _place(tensor)
    if where is None:
        return numpy_helper.to_array(tensor).copy()
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    n_values = int(np.prod(tensor.dims))
    with (folder / data_file(graph)).open("rb") as file:
        file.seek(where)
        return np.frombuffer(file.read(n_values * dtype.itemsize), dtype).reshape(tuple(tensor.dims)).copy()


def _store(folder: Path, graph: str, tensor: onnx.TensorProto, values: np.ndarray) -> None:
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    values = np.ascontiguousarray(values.astype(dtype))
    where = _place(tensor)
    if where is None:
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        return
    with (folder / data_file(graph)).open("r+b") as file:
        file.seek(where)
        file.write(values.tobytes())
    rehash(folder, data_file(graph))


def _place(tensor: onnx.TensorProto) -> int | None:
    """Where the external data of a tensor begins, in bytes; None for one stored in the graph."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return None
    return int(next(entry.value for entry in tensor.external_data if entry.key == "offset"))
