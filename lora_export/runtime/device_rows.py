"""`DeviceRows`: the inputs of one batch on the device, picked from a bank there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from lora_export.runtime.arrays import onnx_element_type
from lora_export.runtime.device_bank import DeviceBank
from lora_export.runtime.device_layout import Layout
from lora_export.runtime.device_memory import PLACE_BYTES
from lora_export.runtime.held_adapter import RowAdapters

# Where a group's inputs begin, as ONNX Runtime's own buffers on CUDA do.
_ALIGNMENT = 256
# Numbers of rows whose bindings are kept.
_MOST_SIZES = 32


@dataclass(frozen=True)
class _Ready:
    """All that picking `n` rows needs.

    Attributes:
        places: Which rows of the tables, int64 `[inputs * n]`, on the device.
        runs: Pick them.
        values: What is picked, by the input's name.
    """

    places: ort.OrtValue
    runs: tuple[Callable[[], None], ...]
    values: Mapping[str, ort.OrtValue]


class DeviceRows:
    """The inputs of one batch; its buffers are kept for the largest batch seen."""

    def __init__(self, bank: DeviceBank) -> None:
        self._bank = bank
        self._layout: Layout | None = None
        self._generation = 0  # of the bank, whose tables the runs read
        self._n_rows = 0  # for which there is room
        self._rows: ort.OrtValue | None = None
        self._places: ort.OrtValue | None = None
        self._ready: dict[int, _Ready] = {}

    @property
    def n_bytes(self) -> int:
        """Of its buffers on the device."""
        if self._rows is None or self._places is None:
            return 0
        return self._rows.tensor_size_in_bytes() + self._places.tensor_size_in_bytes()

    def write(self, rows: Sequence[RowAdapters], _changed: object = None) -> dict[str, ort.OrtValue]:
        """The inputs of `rows`, `[n, …]`; those that no row's adapters bring are left out."""
        with self._bank.lock:
            slots, names = self._bank.slots(rows)
            if not self._bank.tables:
                return {}
            ready = self._ready_for(len(rows))
            ready.places.update_inplace(self._layout.places(slots).ravel())
            for run in ready.runs:
                run()
        return {name: ready.values[name] for name in names}

    def _ready_for(self, n: int) -> _Ready:
        bank = self._bank
        if self._layout is not bank.layout or n > self._n_rows:
            n_rows = max(n, self._n_rows * 3 // 2) if n > self._n_rows else self._n_rows
            n_bytes = sum(_aligned(n_rows * group.slot_bytes) for group in bank.layout.groups)
            n_inputs = sum(len(group.entries) for group in bank.layout.groups)
            self._layout, self._ready = None, {}  # until both are there
            self._rows = self._places = None  # given back before others are asked for
            self._rows = bank.memory.allocate(n_bytes)
            self._places = bank.memory.allocate(n_inputs * n_rows * PLACE_BYTES)
            self._layout, self._n_rows = bank.layout, n_rows
        if self._generation != bank.generation or len(self._ready) >= _MOST_SIZES:
            self._generation, self._ready = bank.generation, {}
        if n not in self._ready:
            self._ready[n] = self._made_ready(n)
        return self._ready[n]

    def _made_ready(self, n: int) -> _Ready:
        memory, runs, values = self._bank.memory, [], {}
        view, first_byte, n_inputs = memory.views(self._rows), 0, 0
        for group, table in zip(self._layout.groups, self._bank.tables, strict=True):
            target = self._rows.data_ptr() + first_byte
            runs += memory.gather(
                table=table,
                row_bytes=group.row_bytes,
                places=self._places,
                first=n_inputs * n,
                n=len(group.entries) * n,
                target=target,
            )
            for index, (entry, shape) in enumerate(zip(group.entries, group.shapes, strict=True)):
                place = first_byte + index * n * group.row_bytes
                values[entry.name] = view(place, (n, *shape), onnx_element_type(entry.dtype))
            first_byte += _aligned(self._n_rows * group.slot_bytes)
            n_inputs += len(group.entries)
        places = memory.views(self._places)(0, [n_inputs * n], np.int64)
        return _Ready(places, tuple(runs), values)


def _aligned(n_bytes: int) -> int:
    return math.ceil(n_bytes / _ALIGNMENT) * _ALIGNMENT
