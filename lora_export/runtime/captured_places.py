"""`Place`, `AdapterPlaces`: where the kernels of a capture read on the device, whatever is bound."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from lora_export.runtime.arrays import onnx_element_type, to_array
from lora_export.runtime.bank import Bank
from lora_export.runtime.composition import Stack, Values
from lora_export.runtime.device_bank import is_head
from lora_export.runtime.device_memory import allocate, views_of
from lora_export.runtime.held_adapter import row_key
from lora_export.runtime.stacking import RowSpec


class Place:
    """A place on the device for arrays of one shape and dtype."""

    def __init__(self, array: np.ndarray, provider: str, session: ort.InferenceSession) -> None:
        view = views_of(allocate(max(1, array.nbytes), provider), provider, session)
        self.value = view(0, array.shape, onnx_element_type(array.dtype.name))
        self._bytes = view(0, [array.nbytes], np.uint8) if array.nbytes else None

    def write(self, array: np.ndarray) -> None:
        if self._bytes is not None:
            self._bytes.update_inplace(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


@dataclass
class _Rows:
    """The adapters of a number of rows: their places on the device, and a number for these places."""

    stack: Stack
    values: Values
    places: int


class AdapterPlaces:
    """The places of adapters; not for several threads at a time.

    The adapters of a number of rows are picked into their places from the device's bank (`device_rows`); heads are
    copied.

    Args:
        session: Any that runs on `provider`.
    """

    def __init__(self, provider: str, session: ort.InferenceSession) -> None:
        self._provider, self._session = provider, session
        self._rows: dict[int, _Rows] = {}  # by their number
        self._heads: dict[tuple, Place] = {}
        self._places: dict[tuple, int] = {(): 0}

    def write(self, bank: Bank, rows: tuple[RowSpec, ...]) -> tuple[Values, int]:
        """The adapters of `rows` in their places, and these places' number, which is another for other places."""
        if not any(rows):
            return bank.constant_inputs, 0
        found = self._rows.get(len(rows))
        if found is None:
            found = self._rows[len(rows)] = _Rows(bank.compositions.new_stack(heads_on="cpu"), {}, 0)
        if not found.places or not found.stack.holds(tuple(map(row_key, rows))):
            found.places = 0  # until all is written
            found.stack.write(rows)
            heads = {entry.name for entry in bank.contract.adapter_inputs if is_head(entry)}
            written = found.stack.values
            values = {name: self._head(name, value) if name in heads else value for name, value in written.items()}
            found.values = {**bank.constant_inputs, **values}
            key = tuple((name, value.data_ptr(), *value.shape()) for name, value in values.items())
            found.places = self._places.setdefault(key, len(self._places))
        return found.values, found.places

    def _head(self, name: str, value: ort.OrtValue) -> ort.OrtValue:
        array = to_array(value)
        key = (name, array.shape)
        if key not in self._heads:
            self._heads[key] = Place(array, self._provider, self._session)
        self._heads[key].write(array)
        return self._heads[key].value
