"""The adapters of a batch's rows as inputs that are put together on the host: only rows that changed are written.

On the CPU that is in place. On another device each input is copied after it was written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import onnxruntime as ort

from lora_export.contract import AdapterInput, GraphContract
from lora_export.runtime.arrays import numpy_dtype, to_ort_value
from lora_export.runtime.held_adapter import RowAdapters, RowKey, row_key
from lora_export.runtime.stacking import Tensors, blended, default_of, fed_entries, filler_of, is_task_vector

# After as many writes that needed half of a buffer's rank or less, it takes the rank that is needed.
PATIENCE = 64


class HostRows:
    """The inputs of one batch that `is_mine` says.

    Its buffers are kept for the largest batch and the largest ranks seen. An input that no row's adapter brings is not
    given.
    """

    def __init__(
        self,
        contract: GraphContract,
        provider: str,
        defaults: Tensors,
        *,
        is_mine: Callable[[AdapterInput], bool] = lambda _: True,
    ) -> None:
        self._contract, self._provider, self._defaults, self._is_mine = contract, provider, defaults, is_mine
        self._buffers: dict[str, _Buffer] = {}
        self._given: frozenset[str] = frozenset()

    def write(self, rows: Sequence[RowAdapters], changed: Sequence[int]) -> dict[str, ort.OrtValue]:
        """The inputs of `rows` on the device, `[n, …]`, of which only those `changed` are others than before.

        Raises:
            UsageProblem: A blend mixes heads of different sizes.
        """
        brought = frozenset().union(*(adapter.names for adapter in {a for row in rows for a, _ in row}))
        before, self._given = self._given, frozenset()
        keys, values = list(map(row_key, rows)), {}
        entries = [entry for entry in fed_entries(self._contract, brought) if self._is_mine(entry)]
        for entry in entries:
            if entry.name not in self._buffers:
                default = default_of(entry, self._defaults)
                self._buffers[entry.name] = _Buffer(entry, self._provider, default)
            buffer = self._buffers[entry.name]
            buffer.write(rows, keys, changed if entry.name in before else range(len(rows)))
            value = buffer.value(len(rows))
            if value is not None:  # rank 0 and no tokens are the default
                values[entry.name] = value
        self._given = frozenset(entry.name for entry in entries)
        return values


class _Buffer:
    """The rows of one input, `[n, …]`, in memory that is kept; it holds the first rows of the last batch and more.

    No adapter is kept alive.

    Args:
        default: What a row without the input's adapters is fed, `[1, …]`.
    """

    def __init__(self, entry: AdapterInput, provider: str, default: np.ndarray) -> None:
        self._entry, self._provider, self._default = entry, provider, default
        self._name, self._axis, self._is_head = entry.name, entry.spec.axis, is_task_vector(entry)
        self._memory = np.empty(0, numpy_dtype(entry.dtype))
        self._filler = filler_of(entry, self._memory.dtype)
        self._rows = self._memory  # as `[rows, …]`
        self._held: list[RowKey | None] = []  # what each row was made of
        self._sizes: list[int] = []  # of what each row was made of, along the axis
        self._n_small = 0
        # A value on the CPU is the buffer itself; on another device it is a copy, made anew after every write.
        self._is_in_place = provider == "cpu"
        self._value: tuple[int, ort.OrtValue | None] | None = None

    def write(self, rows: Sequence[RowAdapters], keys: Sequence[RowKey], changed: Iterable[int]) -> None:
        """Hold the input of `rows`, whose keys are `keys`; only those `changed` may be held otherwise."""
        values: dict[int, tuple[RowKey, np.ndarray]] = {}

        def take(row: int, *, if_other: bool) -> None:
            parts = self._made_of(rows[row])
            key = keys[row] if parts is rows[row] else row_key(parts)
            if not if_other or row >= len(self._held) or self._held[row] != key:
                values[row] = key, value_of(self._entry, parts, self._default)

        for row in changed:
            take(row, if_other=True)
        shape = self._shape_for(values, len(rows))
        if shape != self._rows.shape[1:] or len(rows) > len(self._rows):
            self._allocate(shape, len(rows))
            for row in range(len(rows)):
                if row not in values:
                    take(row, if_other=False)
        for row, (key, value) in values.items():
            self._write_row(row, key, value)

    def _made_of(self, row: RowAdapters) -> RowAdapters:
        if len(row) == 1:
            return row if self._name in row[0][0].names else ()
        return tuple(part for part in row if self._name in part[0].names)

    def _shape_for(self, values: Mapping[int, tuple[RowKey, np.ndarray]], n: int) -> tuple[int, ...]:
        """The shape of every row of a batch; a rank that was larger stays for a while."""
        own = next((value.shape[1:] for _, value in values.values()), self._rows.shape[1:])
        if self._axis is None:
            return own
        sizes = [values[row][1].shape[self._axis] if row in values else self._sizes[row] for row in range(n)]
        place, need = self._axis - 1, max(sizes)
        have = self._rows.shape[self._axis] if self._held else 0
        if have > need and not self._is_head:  # the size of a head is seen in the outputs
            self._n_small = self._n_small + 1 if 2 * need <= have else 0
            need = have if self._n_small <= PATIENCE else need
        return (*own[:place], need, *own[place + 1 :])

    def _allocate(self, shape: tuple[int, ...], n: int) -> None:
        n_elements = math.prod(shape)
        if self._memory.size < n * n_elements:  # with room for more: batches grow row by row
            self._memory = np.empty(max(n * n_elements, 2 * self._memory.size), self._memory.dtype)
        n_rows = self._memory.size // n_elements if n_elements else n
        self._rows = self._memory[: n_rows * n_elements].reshape(n_rows, *shape)
        self._held, self._sizes, self._value, self._n_small = [], [], None, 0

    def _write_row(self, row: int, key: RowKey, value: np.ndarray) -> None:
        while row >= len(self._held):
            self._held.append(None)
            self._sizes.append(0)
        target, is_known = self._rows[row], self._held[row] is not None
        self._held[row] = None  # until it is whole
        end = self._sizes[row] if is_known else None
        self._sizes[row] = write_row(target, value[0], self._axis, filler=self._filler, used=end)
        self._held[row] = key
        if not self._is_in_place:
            self._value = None

    def value(self, n: int) -> ort.OrtValue | None:
        """The first `n` rows on the device; None if they hold nothing."""
        if self._value is None or self._value[0] != n:
            rows = self._rows[:n]
            self._value = (n, to_ort_value(rows, self._provider) if rows.size else None)
        return self._value[1]


def write_row(
    target: np.ndarray, value: np.ndarray, axis: int | None, *, filler: float, used: int | None = None
) -> int:
    """Write `value` to the beginning of `target`, a row, and the filler after it; how much `value` takes of the axis.

    Args:
        axis: Where `value` may be smaller than `target`, counted with the axis of the rows before it; None for nowhere.
        used: From where on `target` holds the filler already; None if it holds anything.
    """
    if axis is None:
        target[...] = value
        return 0
    size, end = value.shape[axis - 1], target.shape[axis - 1] if used is None else used
    if axis == 1:
        target[:size] = value
    elif size:
        _copy(value, target[:, :size])
    if end > size:
        target[(slice(None),) * (axis - 1) + (slice(size, end),)] = filler
    return size


def _copy(source: np.ndarray, target: np.ndarray) -> None:
    """Copy to a part of each row of a matrix, a row at a time: numpy does that faster than number by number."""
    whole = np.dtype((np.void, source.shape[-1] * source.itemsize))
    target.view(whole)[...] = np.ascontiguousarray(source).view(whole)


def value_of(entry: AdapterInput, row: RowAdapters, default: np.ndarray) -> np.ndarray:
    """What a row is fed of adapters that all bring the input, `[1, …]`."""
    if len(row) == 1 and row[0][1] == 1:
        return row[0][0].tensors[entry.name]
    return blended(entry, {adapter: adapter.tensors for adapter, _ in row}, row, default=default)
