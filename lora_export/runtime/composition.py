"""The adapters of a batch's rows as inputs on the device, kept from run to run.

- One adapter for the whole batch is fed as it is held: nothing is written.
- Else a `Stack` holds the rows, in buffers kept for the largest batch and the largest ranks seen. On the CPU only rows
  that changed are written (`host_rows`). On another device all rows are picked from a bank there (`device_rows`), but
  for heads, which are put together on the host and copied. An input that no row's adapter brings is not fed.
- Runs of several threads may read one stack at once, if they are of the same rows. A stack that a run reads is never
  written: a run of other rows takes another stack. So a run sees its own rows from its beginning to its end.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence

import onnxruntime as ort

from lora_export.contract import GraphContract
from lora_export.runtime.arrays import to_ort_value
from lora_export.runtime.device_bank import DeviceBank, is_head
from lora_export.runtime.device_rows import DeviceRows
from lora_export.runtime.held_adapter import HeldAdapter, RowAdapters, RowKey, row_key
from lora_export.runtime.host_rows import HostRows, value_of
from lora_export.runtime.stacking import Tensors, default_of, fed_entries

# What a composition binds: its inputs on the device.
Values = Mapping[str, ort.OrtValue]

# Stacks that wait for a next run of their rows: for hosts that alternate between two mixes.
_IDLE_STACKS = 2


class Stack:
    """The inputs of one batch; it keeps no adapter alive.

    Attributes:
        values: On the device.
        n_users: Runs that read it, or the one that writes it.
        is_ready: Whether `values` are those of the rows that were written.
    """

    def __init__(self, parts: Sequence[HostRows | DeviceRows]) -> None:
        self.parts = parts
        self._keys: tuple[RowKey, ...] = ()
        self.values: Values = {}
        self.n_users, self.is_ready = 0, False

    def write(self, rows: tuple[RowAdapters, ...]) -> None:
        """Make `values` those of `rows`.

        Raises:
            UsageProblem: A blend mixes heads of different sizes.
        """
        keys = tuple(map(row_key, rows))
        changed = [n for n, key in enumerate(keys) if n >= len(self._keys) or self._keys[n] != key]
        self._keys, self.values = keys, {}  # no part of a buffer is kept that is given back
        self.values = {name: value for part in self.parts for name, value in part.write(rows, changed).items()}

    def holds(self, keys: tuple[RowKey, ...]) -> bool:
        """Whether it was written for these rows, no more and no fewer."""
        return self._keys == keys

    def n_common(self, keys: tuple[RowKey, ...]) -> int:
        """How many of these rows it holds in their places."""
        return sum(a == b for a, b in zip(self._keys, keys, strict=False))


class Compositions:
    """The compositions of one graph; any thread may ask.

    Args:
        banked: Whether adapters lie in a bank on the device, which a composition is picked from; by default where the
            device is not the CPU.
        max_bytes: The most bytes of that bank, but for what one batch needs; None for no bound.
    """

    def __init__(
        self,
        contract: GraphContract,
        provider: str,
        defaults: Tensors,
        *,
        banked: bool | None = None,
        max_bytes: int | None = None,
    ) -> None:
        self._contract, self._provider, self._defaults = contract, provider, defaults
        self.max_bytes = max_bytes
        is_banked_here = provider != "cpu" if banked is None else banked
        self._bank = DeviceBank(contract, provider, defaults, max_bytes=max_bytes) if is_banked_here else None
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
        stack = self.new_stack()
        stack.write(rows)
        return stack.values

    def new_stack(self, heads_on: str | None = None) -> Stack:
        """A stack that nobody else has.

        Args:
            heads_on: The device of what is put together on the host; by default that of all else.
        """
        if self._bank is None:
            return Stack([HostRows(self._contract, self._provider, self._defaults)])
        parts: list[HostRows | DeviceRows] = [DeviceRows(self._bank)]
        if any(map(is_head, self._contract.adapter_inputs)):
            heads = HostRows(self._contract, heads_on or self._provider, self._defaults, is_mine=is_head)
            parts.insert(0, heads)  # what they refuse must not enter the bank
        return Stack(parts)

    @property
    def device_bytes(self) -> tuple[int, int]:
        """What the bank takes, and the buffers of the stacks that were picked from it."""
        if self._bank is None:
            return 0, 0
        picked = [part for stack in self._stacks for part in stack.parts if isinstance(part, DeviceRows)]
        return self._bank.n_bytes, sum(part.n_bytes for part in picked)

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
        keys = tuple(map(row_key, rows))
        with self._changing:
            stack = next((each for each in self._stacks if each.is_ready and each.holds(keys)), None)
            if stack is not None:
                stack.n_users += 1
                self._stacks.append(self._stacks.pop(self._stacks.index(stack)))
                return stack
            stack = self._to_be_written(keys)
            stack.n_users, stack.is_ready = 1, False
        try:
            stack.write(rows)
        except BaseException:
            self._release(stack)
            raise
        stack.is_ready = True
        return stack

    def _to_be_written(self, keys: tuple[RowKey, ...]) -> Stack:
        """A stack that no run reads: the one with the most of these rows, or else the one not used the longest."""
        idle = [each for each in self._stacks if not each.n_users]
        best = max(idle, key=lambda each: each.n_common(keys), default=None)
        if best is None or (not best.n_common(keys) and len(idle) < _IDLE_STACKS):
            best = self.new_stack()
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
