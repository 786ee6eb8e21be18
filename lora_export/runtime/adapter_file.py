"""An `.onnx_adapter` file: read, and compared with the graph that is to take it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from lora_export.artifact import sha256_of
from lora_export.contract import ROWS, GraphContract
from lora_export.errors import InputRefused, of_the_system
from lora_export.runtime.arrays import to_array


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
    if not path.is_file():
        raise InputRefused(
            "There is no such adapter file",
            where=str(path),
            expected="an .onnx_adapter file; a PEFT folder becomes one with `lora-export add`",
        )
    try:
        adapter = ort.AdapterFormat.read_adapter(str(path))
        # The values are views of the adapter's memory, which goes with `adapter`.
        return {name: to_array(value).copy() for name, value in adapter.get_parameters().items()}
    except (RuntimeError, ValueError) as error:  # also a name that is no text
        if (of_system := of_the_system(error)) is not None:
            raise of_system from error
        raise InputRefused("The file is no ONNX Runtime adapter, or is truncated", where=str(path)) from error
