"""The adapters of a batch's rows as inputs on the device, kept from run to run: only rows that changed are written.

- One adapter for the whole batch is fed as it is held: nothing is written.
- Else a `Stack` holds the rows. Its buffers are kept for the largest batch and the largest ranks seen. A row is written
  where it is another than before, and an input that no row's adapter brings is not fed.
- Runs of several threads may read one stack at once, if they are of the same rows. A stack that a run reads is never
  written: a run of other rows takes another stack. So a run sees its own rows from its beginning to its end.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnxruntime as ort

from lora_export.contract import AdapterInput, GraphContract
from lora_export.runtime.arrays import numpy_dtype, to_ort_value
from lora_export.runtime.held_adapter import HeldAdapter, RowAdapters
from lora_export.runtime.stacking import Tensors, blended, default_of, fed_entries, filler_of, is_task_vector

# What a composition binds: its inputs on the device.
Values = Mapping[str, ort.OrtValue]

# Stacks that wait for a next run of their rows: for hosts that alternate between two mixes.
_IDLE_STACKS = 2
# After as many writes that needed half of a buffer's rank or less, it takes the rank that is needed.
_PATIENCE = 64


class _Buffer:
    """The rows of one input, `[n, …]`, in memory that is kept; it holds the first rows of the last batch and more.

    Args:
        default: What a row without the input's adapters is fed, `[1, …]`.
    """

    def __init__(self, entry: AdapterInput, provider: str, default: np.ndarray) -> None:
        self._entry, self._provider, self._default = entry, provider, default
        self._name, self._axis, self._is_head = entry.name, entry.spec.axis, is_task_vector(entry)
        self._memory = np.empty(0, numpy_dtype(entry.dtype))
        self._filler = filler_of(entry, self._memory.dtype)
        self._rows = self._memory  # as `[rows, …]`
        self._held: list[RowAdapters | None] = []  # what each row was made of
        self._sizes: list[int] = []  # of what each row was made of, along the axis
        self._n_small = 0
        # A value on the CPU is the buffer itself; on another device it is a copy, made anew after every write.
        self._is_in_place = provider == "cpu"
        self._value: tuple[int, ort.OrtValue | None] | None = None

    def write(self, rows: Sequence[RowAdapters], changed: Iterable[int]) -> None:
        """Hold the input of `rows`; only those `changed` may be held otherwise."""
        values: dict[int, tuple[RowAdapters, np.ndarray]] = {}

        def make(row: int, made_of: RowAdapters) -> None:
            values[row] = made_of, value_of(self._entry, made_of, self._default)

        for row in changed:
            made_of = self._made_of(rows[row])
            if row >= len(self._held) or self._held[row] != made_of:
                make(row, made_of)
        shape = self._shape_for(values, len(rows))
        if shape != self._rows.shape[1:] or len(rows) > len(self._rows):
            self._allocate(shape, len(rows))
            for row, adapters in enumerate(rows):
                if row not in values:
                    make(row, self._made_of(adapters))
        for row, (made_of, value) in values.items():
            self._write_row(row, made_of, value)

    def _made_of(self, row: RowAdapters) -> RowAdapters:
        if len(row) == 1:
            return row if self._name in row[0][0].names else ()
        return tuple(part for part in row if self._name in part[0].names)

    def _shape_for(self, values: Mapping[int, tuple[RowAdapters, np.ndarray]], n: int) -> tuple[int, ...]:
        """The shape of every row of a batch; a rank that was larger stays for a while."""
        own = next((value.shape[1:] for _, value in values.values()), self._rows.shape[1:])
        if self._axis is None:
            return own
        sizes = [values[row][1].shape[self._axis] if row in values else self._sizes[row] for row in range(n)]
        place, need = self._axis - 1, max(sizes)
        have = self._rows.shape[self._axis] if self._held else 0
        if have > need and not self._is_head:  # the size of a head is seen in the outputs
            self._n_small = self._n_small + 1 if 2 * need <= have else 0
            need = have if self._n_small <= _PATIENCE else need
        return (*own[:place], need, *own[place + 1 :])

    def _allocate(self, shape: tuple[int, ...], n: int) -> None:
        n_elements = math.prod(shape)
        if self._memory.size < n * n_elements:  # with room for more: batches grow row by row
            self._memory = np.empty(max(n * n_elements, 2 * self._memory.size), self._memory.dtype)
        n_rows = self._memory.size // n_elements if n_elements else n
        self._rows = self._memory[: n_rows * n_elements].reshape(n_rows, *shape)
        self._held, self._sizes, self._value, self._n_small = [], [], None, 0

    def _write_row(self, row: int, made_of: RowAdapters, value: np.ndarray) -> None:
        while row >= len(self._held):
            self._held.append(None)
            self._sizes.append(0)
        target, is_known = self._rows[row], self._held[row] is not None
        self._held[row] = None  # until it is whole
        if self._axis is None:
            target[...] = value[0]
        else:
            size, end = value.shape[self._axis], self._sizes[row] if is_known else target.shape[self._axis - 1]
            if self._axis == 1:
                target[:size] = value[0]
            elif size:
                _copy(value[0], target[:, :size])
            if end > size:  # what another left there
                target[(slice(None),) * (self._axis - 1) + (slice(size, end),)] = self._filler
            self._sizes[row] = size
        self._held[row] = made_of
        if not self._is_in_place:
            self._value = None

    def value(self, n: int) -> ort.OrtValue | None:
        """The first `n` rows on the device; None if they hold nothing."""
        if self._value is None or self._value[0] != n:
            rows = self._rows[:n]
            self._value = (n, to_ort_value(rows, self._provider) if rows.size else None)
        return self._value[1]


def _copy(source: np.ndarray, target: np.ndarray) -> None:
    """Copy to a part of each row of a matrix, a row at a time: numpy does that faster than number by number."""
    whole = np.dtype((np.void, source.shape[-1] * source.itemsize))
    target.view(whole)[...] = np.ascontiguousarray(source).view(whole)


class Stack:
    """The inputs of one batch.

    Attributes:
        rows: Whose inputs `values` are.
        values: On the device.
        n_users: Runs that read it, or the one that writes it.
        is_ready: Whether `values` are those of `rows`.
    """

    def __init__(self, contract: GraphContract, provider: str, defaults: Tensors) -> None:
        self._contract, self._provider, self._defaults = contract, provider, defaults
        self._buffers: dict[str, _Buffer] = {}
        self._fed: frozenset[str] = frozenset()
        self.rows: tuple[RowAdapters, ...] = ()
        self.values: Values = {}
        self.n_users, self.is_ready = 0, False

    def write(self, rows: tuple[RowAdapters, ...]) -> None:
        """Make `values` those of `rows`.

        Raises:
            UsageProblem: A blend mixes heads of different sizes.
        """
        changed = [n for n, row in enumerate(rows) if n >= len(self.rows) or self.rows[n] != row]
        brought = {name for adapter in {a for row in rows for a, _ in row} for name in adapter.names}
        before, self._fed, self.rows = self._fed, frozenset(), rows
        values = {}
        entries = fed_entries(self._contract, brought)
        for entry in entries:
            if entry.name not in self._buffers:
                default = default_of(entry, self._defaults)
                self._buffers[entry.name] = _Buffer(entry, self._provider, default)
            buffer = self._buffers[entry.name]
            buffer.write(rows, changed if entry.name in before else range(len(rows)))
            value = buffer.value(len(rows))
            if value is not None:  # rank 0 and no tokens are the default
                values[entry.name] = value
        self.values, self._fed = values, frozenset(entry.name for entry in entries)

    def n_common(self, rows: Sequence[RowAdapters]) -> int:
        """How many of `rows` it holds in their places."""
        return sum(a == b for a, b in zip(self.rows, rows, strict=False))


class Compositions:
    """The compositions of one graph; any thread may ask."""

    def __init__(self, contract: GraphContract, provider: str, defaults: Tensors) -> None:
        self._contract, self._provider, self._defaults = contract, provider, defaults
        self._stacks: list[Stack] = []  # the one that was used last at the end
        self._changing = threading.Lock()

    @contextlib.contextmanager
    def of(self, rows: tuple[RowAdapters, ...]) -> Iterator[Values]:
        """The inputs of `rows`, which stay as they are while the context is entered."""
        if (one := _only_adapter(rows)) is not None or not any(rows):
            yield {} if one is None else self._as_held(one, rows[0])
            return
        stack = self._take(rows)
        try:
            yield stack.values
        finally:
            self._release(stack)

    def alone(self, rows: tuple[RowAdapters, ...]) -> Values:
        """The inputs of `rows` in memory of their own, which no later composition changes."""
        if (one := _only_adapter(rows)) is not None:
            return self._as_held(one, rows[0])
        stack = Stack(self._contract, self._provider, self._defaults)
        stack.write(rows)
        return stack.values

    def _as_held(self, adapter: HeldAdapter, row: RowAdapters) -> Values:
        """The adapter's own tensors, and the defaults that go with them."""

        def make() -> Values:
            entries = fed_entries(self._contract, adapter.names)
            arrays = {}
            for entry in entries:
                made_of = row if entry.name in adapter.names else ()
                arrays[entry.name] = value_of(entry, made_of, default_of(entry, self._defaults))
            return {name: to_ort_value(array, self._provider) for name, array in arrays.items() if array.size}

        return adapter.on_device(make)

    def _take(self, rows: tuple[RowAdapters, ...]) -> Stack:
        with self._changing:
            stack = next((each for each in self._stacks if each.is_ready and each.rows == rows), None)
            if stack is not None:
                stack.n_users += 1
                self._stacks.append(self._stacks.pop(self._stacks.index(stack)))
                return stack
            stack = self._to_be_written(rows)
            stack.n_users, stack.is_ready = 1, False
        try:
            stack.write(rows)
        except BaseException:
            self._release(stack)
            raise
        stack.is_ready = True
        return stack

    def _to_be_written(self, rows: tuple[RowAdapters, ...]) -> Stack:
        """A stack that no run reads: the one with the most of `rows`, or else the one not used the longest."""
        idle = [each for each in self._stacks if not each.n_users]
        best = max(idle, key=lambda each: each.n_common(rows), default=None)
        if best is None or (not best.n_common(rows) and len(idle) < _IDLE_STACKS):
            best = Stack(self._contract, self._provider, self._defaults)
        else:
            self._stacks.remove(best)
        self._stacks.append(best)
        return best

    def _release(self, stack: Stack) -> None:
        with self._changing:
            stack.n_users -= 1
            idle = [each for each in self._stacks if not each.n_users]
            for each in idle[: max(0, len(idle) - _IDLE_STACKS)]:
                self._stacks.remove(each)


def _only_adapter(rows: Sequence[RowAdapters]) -> HeldAdapter | None:
    """The adapter that serves the whole batch as it is; None where rows differ, or blend."""
    is_one = len(rows) == 1 and len(rows[0]) == 1 and rows[0][0][1] == 1
    return rows[0][0][0] if is_one else None


def value_of(entry: AdapterInput, row: RowAdapters, default: np.ndarray) -> np.ndarray:
    """What a row is fed of adapters that all bring the input, `[1, …]`."""
    if len(row) == 1 and row[0][1] == 1:
        return row[0][0].tensors[entry.name]
    return blended(entry, {adapter: adapter.tensors for adapter, _ in row}, row, default=default)
