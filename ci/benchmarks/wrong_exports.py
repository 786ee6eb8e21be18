"""Writes wrong values into a sound export, merged or dynamic, where the right ones are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from adapter_values import Trained
from stored_tensors import adapter_tensors, replace_weights, write_adapter_tensors

from lora_export.artifact import ExportKind, Manifest, read_manifest


def write_values(folder: Path, sound: tuple[Trained, ...], wrong: tuple[Trained, ...]) -> bool:
    """Put `wrong` in place of `sound`, all adapters of the export in its order; whether anything changed."""
    manifest = read_manifest(folder)
    changes = _base_changes(sound[0], wrong[0])
    if manifest.kind is ExportKind.MERGED:
        changes = _merged_changes(sound[0], wrong[0])
    if changes:
        replace_weights(folder, changes)
    if manifest.kind is ExportKind.MERGED:
        return bool(changes)
    written = [
        _write_inputs(folder, manifest, record.files, value)
        for record, before, value in zip(manifest.adapters, sound, wrong, strict=True)
        if before is not value
    ]
    return any(written) or bool(changes)


def _base_changes(sound: Trained, wrong: Trained) -> list[tuple[np.ndarray, np.ndarray]]:
    paths = [path for path in sound.base if sound.base[path] is not wrong.base[path]]
    return [(sound.base[path], wrong.base[path]) for path in paths]


def _merged_changes(sound: Trained, wrong: Trained) -> list[tuple[np.ndarray, np.ndarray]]:
    """Every stored parameter that differs; one that `wrong` leaves alone is the base's, zeros if it has none."""
    before, after = sound.parameters(), wrong.parameters()
    moved = [path for path in sound.base if sound.base[path] is not wrong.base[path]]
    found = []
    for path in dict.fromkeys([*before, *after, *moved]):
        old = before.get(path, sound.base.get(path))
        new = after.get(path, wrong.base.get(path, np.zeros_like(old)))
        if not np.array_equal(old, new):
            found.append((old, new))
    return found


def _write_inputs(folder: Path, manifest: Manifest, files: dict[str, str], value: Trained) -> bool:
    """Overwrite the adapter's file for each graph with what `value` feeds to it."""
    inputs = value.inputs()
    changed = False
    for graph, file in files.items():
        dtypes = {entry.name: entry.dtype for entry in manifest.graphs[graph].adapter_inputs}
        tensors = {name: array.astype(dtypes[name]) for name, array in inputs.items() if name in dtypes}
        changed |= not _same(tensors, adapter_tensors(folder, file))
        write_adapter_tensors(folder, file, tensors)
    return changed


def _same(tensors: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> bool:
    return tensors.keys() == others.keys() and all(
        tensors[name].shape == others[name].shape
        and np.allclose(tensors[name], others[name], rtol=2 * _eps(others[name]), atol=1e-7)
        for name in tensors
    )


def _eps(array: np.ndarray) -> float:
    return float(np.finfo(array.dtype).eps) if array.dtype.kind == "f" else 0.0
