"""An `.onnx_adapter` file: read, and compared with the graph that is to take it."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from lora_export.artifact import sha256_of
from lora_export.contract import ROWS, GraphContract
from lora_export.errors import InputRefused, of_the_system
from lora_export.named import no_such
from lora_export.runtime.arrays import memory_of, to_array

# How much of a tensor is looked at for a number that is not 0, and at how many places of a file it may begin.
_BYTES_LOOKED_AT, _MOST_PLACES = 1024, 8


def require_unchanged(path: Path, expected: str | None) -> None:
    """Refuse a file of an export that has another sha256 than its manifest says."""
    next_step = "export again, or pack the adapter with `lora-export add`"
    _require_sha256(path, expected, "An adapter file is not the one that was exported", next_step=next_step)


def _require_sha256(path: Path, expected: str | None, what: str, *, next_step: str) -> None:
    found = sha256_of(path) if path.is_file() else "no such file"
    if found != expected:
        raise InputRefused(what, where=str(path), expected=f"sha256 {expected}", found=found, next_step=next_step)


def reader_of(path: Path) -> Callable[[], dict[str, np.ndarray]]:
    """What reads the tensors of `path` again and refuses the file if it is not what it is now."""
    expected = sha256_of(path)

    def read_again() -> dict[str, np.ndarray]:
        what = "An adapter's file changed after it was loaded, and its tensors were dropped from memory"
        _require_sha256(path, expected, what, next_step="load it again, or pin it where its file does not stay")
        return read_adapter(path)

    return read_again


def require_fit(path: Path, tensors: Mapping[str, np.ndarray], contract: GraphContract) -> None:
    """Refuse what ONNX Runtime or a stacking would trip over later: tensors unfit, missing or not finite."""
    by_name = {entry.name: entry for entry in contract.adapter_inputs}
    sizes = {ROWS: 1}
    for name, array in tensors.items():
        entry = by_name.get(name)
        if entry is None or array.dtype.name != entry.dtype or not _has_shape(array, entry.dims, sizes):
            raise InputRefused(
                "The adapter was made for another graph",
                where=f"{path}: {name} {list(array.shape)} {array.dtype}",
                expected=f"{list(entry.dims)} {entry.dtype}" if entry else "an adapter input of this graph",
                next_step="pack it for this export with `lora-export add`",
            )
        for kind in entry.spec.companions:
            other = contract.of_module(entry.module).get(kind)
            if other is None or other.name in tensors:
                continue
            # A replaced weight may go with the stored bias, if that has its size.
            fits = other.default is not None and other.default.shape[-1] == array.shape[-1]
            if not fits:
                raise InputRefused(
                    "The adapter lacks a tensor", where=str(path), expected=f"{other.name} beside {name}"
                )
        if not np.isfinite(array.astype(np.float32)).all():
            raise InputRefused("The adapter holds numbers that are not finite", where=f"{path}: {name}")


def _has_shape(array: np.ndarray, dims: Sequence[int | str], sizes: dict[str, int]) -> bool:
    """Whether `array` has `dims`; a named size is what it was where `sizes` first met it."""
    if array.ndim != len(dims):
        return False
    pairs = zip(dims, array.shape, strict=True)
    return all(n == (dim if isinstance(dim, int) else sizes.setdefault(dim, n)) for dim, n in pairs)


def read_adapter(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file, in memory of their own."""
    # The values are views of the adapter's memory, which goes with it.
    return _of_values(path, lambda values: {name: to_array(value).copy() for name, value in values.items()})


def map_adapter(path: Path) -> dict[str, np.ndarray]:
    """As `read_adapter`, but views of the file's pages, which every process that maps them shares.

    ONNX Runtime reads the file into a copy and checks it. A tensor's offset in the copy is taken for its offset in the
    file. The bytes of both are compared, and a tensor that differs is copied.
    """
    return _of_values(path, lambda values: _mapped(path, values))


def _of_values(
    path: Path, make: Callable[[Mapping[str, ort.OrtValue]], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise no_such(
            "adapter file", path, expected="an .onnx_adapter file; a PEFT folder becomes one with `lora-export add`"
        )
    try:
        adapter = ort.AdapterFormat.read_adapter(str(path))
        return make(adapter.get_parameters())
    except (RuntimeError, ValueError) as error:  # also a name that is no text
        if (of_system := of_the_system(error)) is not None:
            raise of_system from error
        raise InputRefused("The file is no ONNX Runtime adapter, or is truncated", where=str(path)) from error


def _mapped(path: Path, values: Mapping[str, ort.OrtValue]) -> dict[str, np.ndarray]:
    with path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    contents = {name: memory_of(value).tobytes() for name, value in values.items() if value.tensor_size_in_bytes()}
    start = _start(values, contents, pages)
    found = {}
    for name, value in values.items():
        array = to_array(value)
        place = 0 if start is None else value.data_ptr() - start
        if start is None or name not in contents or place % array.itemsize:
            found[name] = array.copy()
        else:
            found[name] = np.frombuffer(pages, array.dtype, array.size, place).reshape(array.shape)
    return found


def _start(values: Mapping[str, ort.OrtValue], contents: Mapping[str, bytes], pages: mmap.mmap) -> int | None:
    """The address of the file's first byte in ONNX Runtime's copy of it; None if the tensors are no parts of one."""
    # Not one of zeros only, which are in many places.
    sought = next((name for name, content in contents.items() if any(content[:_BYTES_LOOKED_AT])), None)
    place = -1 if sought is None else pages.find(contents[sought])
    for _ in range(_MOST_PLACES):
        if place < 0:
            return None
        start = values[sought].data_ptr() - place
        offsets = {name: values[name].data_ptr() - start for name in contents}
        if all(
            offset >= 0 and pages[offset : offset + len(contents[name])] == contents[name]
            for name, offset in offsets.items()
        ):
            return start
        place = pages.find(contents[sought], place + 1)
    return None
