"""`DeviceBank`: what rows run, on the device. An entry is written once, and a composition only picks rows of it.

An entry is what a row runs: an adapter, a blend, or nothing, which is the base. It has a slot in the table of each
group of inputs (`device_layout`), padded to the largest rank in use. An entry stays until its slot is needed:

1. Adapters that are gone, and blends that the batch at hand does not run, give up their slots.
2. The bank grows, if its bound allows it.
3. The entry that was used the longest ago gives up its slot.
4. Whatever one batch needs gets its slots, even beyond the bound.

The bank is laid out anew for a larger rank, for another input, and after a while in which half of its rank was enough.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lora_export.contract import AdapterInput, Blend, GraphContract
from lora_export.errors import UsageProblem
from lora_export.runtime.arrays import numpy_dtype, to_ort_value
from lora_export.runtime.device_layout import Group, Layout, layout_of
from lora_export.runtime.device_memory import DeviceMemory
from lora_export.runtime.held_adapter import RowAdapters, RowKey, row_key
from lora_export.runtime.host_rows import PATIENCE, value_of, write_row
from lora_export.runtime.stacking import Tensors, default_of, fed_entries, filler_of, is_task_vector

# The inputs that a row's adapters bring, and their sizes where adapters differ in size.
_Footprint = frozenset[tuple[str, int]]
# Of mixes of ranks; each takes some kilobytes.
_MOST_NEEDS = 256


def is_head(entry: AdapterInput) -> bool:
    """Whether its size is seen in the outputs, so that it must be no larger than a batch needs: no bank holds it."""
    axis = entry.spec.axis
    return is_task_vector(entry) and axis is not None and not isinstance(entry.dims[axis], int)


@dataclass(frozen=True)
class _Entry:
    slot: int
    footprint: _Footprint
    is_blend: bool


@dataclass(frozen=True, eq=False)
class _Need:
    """What a composition needs: the inputs that are fed, and the sizes of those in which adapters differ."""

    names: frozenset[str]
    sizes: Mapping[str, int]

    def fits(self, layout: Layout) -> bool:
        return self.names <= layout.names and all(size <= layout.sizes[name] for name, size in self.sizes.items())


class DeviceBank:
    """The bank of one graph. Who uses it holds `lock` until what it needs of it is read.

    Attributes:
        lock: Held by one thread at a time.
        layout: Of its tables; None before the first entry.
        tables: On the device, one for each group.
        generation: Another number after each change of where the tables lie.

    Args:
        max_bytes: The most bytes of its tables, but for what one composition needs; None for no bound.
    """

    def __init__(
        self, contract: GraphContract, provider: str, defaults: Tensors, *, max_bytes: int | None = None
    ) -> None:
        self._contract, self._provider, self._max_bytes = contract, provider, max_bytes
        by_adapters = [each for each in contract.adapter_inputs if each.spec.blend is not Blend.FROM_PROMPT]
        self._inputs = [each for each in by_adapters if not is_head(each)]
        self._defaults = {each.name: default_of(each, defaults) for each in self._inputs}
        # Where adapters differ in size; the default is empty there.
        self._axes = {each.name: each.spec.axis for each in self._inputs if not self._defaults[each.name].size}
        self.memory, self.lock = DeviceMemory(provider), threading.Lock()
        self._footprints: dict[_Footprint, _Footprint] = {}
        self._needs: dict[frozenset[_Footprint], _Need] = {}
        self.generation = 0
        self._lay_out(None)

    @property
    def n_bytes(self) -> int:
        """Of its tables."""
        return sum(table.tensor_size_in_bytes() for table in self.tables)

    def slots(self, rows: Sequence[RowAdapters]) -> tuple[list[int], frozenset[str]]:
        """The slots of what `rows` run, which enters where it is not there; and the names of the inputs to feed.

        Raises:
            InputRefused: The file of an adapter that is to be read again is not what it was.
            UsageProblem: It does not fit into the session's bound.
        """
        for adapter in {adapter for row in rows for adapter, _ in row}:
            adapter.use()
        keys = [row_key(row) for row in rows]
        wanted = dict(zip(keys, rows, strict=True))
        made = {key: self._made(row) for key, row in wanted.items() if key not in self._held}
        footprints = {key: self._footprint(made[key]) if key in made else self._held[key].footprint for key in wanted}
        need = self._need(frozenset(footprints.values()))
        layout = self._layout_for(need)
        if layout is not self.layout:
            made |= {key: self._made(row) for key, row in wanted.items() if key not in made}
            self._lay_out(layout)
        try:
            self._make_room(len(made), wanted)
            for key, tensors in made.items():
                self._upload(self._free[-1], tensors)
                is_blend = len(key) > 1 or any(weight != 1 for _, weight in key)
                self._held[key] = _Entry(self._free.pop(), footprints[key], is_blend)
        except BaseException:  # such as no memory on the device
            self._lay_out(None)
            raise
        for key in wanted:
            self._held.move_to_end(key)
        return [self._held[key].slot for key in keys], need.names

    def _made(self, row: RowAdapters) -> dict[str, np.ndarray]:
        """The tensors that a row's adapters bring, `[1, …]`, by the input's name."""
        found = {}
        for entry in self._inputs:
            parts = tuple(part for part in row if entry.name in part[0].names)
            if parts:
                found[entry.name] = value_of(entry, parts, self._defaults[entry.name])
        return found

    def _footprint(self, tensors: Tensors) -> _Footprint:
        axes = self._axes
        found = frozenset((name, array.shape[axes[name]] if name in axes else 0) for name, array in tensors.items())
        return self._footprints.setdefault(found, found)  # one object of each, whose hash is known

    def _need(self, footprints: frozenset[_Footprint]) -> _Need:
        if footprints not in self._needs:
            largest: dict[str, int] = {}
            for name, size in (each for footprint in footprints for each in footprint):
                largest[name] = max(size, largest.get(name, 0))
            sizes = {name: size for name, size in largest.items() if name in self._axes and size}
            fed = [entry.name for entry in fed_entries(self._contract, largest) if entry.name in self._defaults]
            names = frozenset(name for name in fed if name in sizes or name not in self._axes)
            if len(self._needs) >= _MOST_NEEDS:
                self._needs.clear()
            self._needs[footprints] = _Need(names, sizes)
        return self._needs[footprints]

    def _layout_for(self, need: _Need) -> Layout:
        """The layout as it is if it serves `need`, and was not twice as large as needed for a while."""
        layout, self._n_looks = self.layout, self._n_looks + 1
        self._recent[need] = None
        if layout is not None and not need.fits(layout):
            return self._layout_of([need, _Need(layout.names, layout.sizes)])
        if layout is None or self._n_looks > PATIENCE:
            recent = self._layout_of(list(self._recent))
            self._recent, self._n_looks = {need: None}, 0
            if layout is None or any(2 * recent.sizes.get(name, 0) <= size for name, size in layout.sizes.items()):
                return recent
        return layout

    def _layout_of(self, needs: Sequence[_Need]) -> Layout:
        sizes: dict[str, int] = {}
        for name, size in (each for need in needs for each in need.sizes.items()):
            sizes[name] = max(size, sizes.get(name, 0))
        return layout_of(self._inputs, frozenset().union(*(n.names for n in needs)), sizes, defaults=self._defaults)

    def _lay_out(self, layout: Layout | None) -> None:
        """Go on without an entry."""
        self.layout, self.tables, self.generation = layout, (), self.generation + 1
        self._held: OrderedDict[RowKey, _Entry] = OrderedDict()  # the one that was used last at the end
        self._free, self._n_slots = [], 0
        self._recent: dict[_Need, None] = {}  # since the sizes were looked at
        self._n_looks = 0

    def _make_room(self, n: int, wanted: Collection[RowKey]) -> None:
        """Have `n` free slots, none of them of what is `wanted`."""
        bounds = [self.layout.most_slots]
        if self._max_bytes is not None and self.layout.slot_bytes:
            bounds.append(self._max_bytes // self.layout.slot_bytes)
        if len(self._free) < n:
            self._give_back([key for key in self._held if any(adapter() is None for adapter, _ in key)])
            blends = [key for key, entry in self._held.items() if entry.is_blend and key not in wanted]
            self._give_back(blends[: max(0, n - len(self._free))])
        if len(self._free) < n:
            self._grow(min(max(self._n_slots + n - len(self._free), self._n_slots * 3 // 2), *bounds))
            others = [key for key in self._held if key not in wanted]
            self._give_back(others[: max(0, n - len(self._free))])
            self._grow(self._n_slots + n - len(self._free))

    def _give_back(self, keys: Collection[RowKey]) -> None:
        for key in keys:
            self._free.append(self._held.pop(key).slot)

    def _grow(self, n_slots: int) -> None:
        """Have at least `n_slots` slots."""
        if n_slots <= self._n_slots:
            return
        if n_slots > self.layout.most_slots:
            raise UsageProblem(
                "A batch runs more different adapters than ONNX Runtime can address on the device",
                expected=f"at most {self.layout.most_slots:,}",
                found=f"{n_slots:,}",
                next_step="run it in parts",
            )
        tables, old = list(self.tables) or [None] * len(self.layout.groups), self._n_slots
        self.tables, self.generation = (), self.generation + 1  # a table is given back when its copy is there
        places = to_ort_value(np.arange(max(old, 1)), self._provider)
        for index, group in enumerate(self.layout.groups):
            table = self.memory.allocate(n_slots * group.slot_bytes)
            if old:
                for run in self.memory.gather(
                    table=tables[index], row_bytes=group.slot_bytes, places=places, n=old, target=table.data_ptr()
                ):
                    run()
            tables[index] = table
        self._free += range(n_slots - 1, old - 1, -1)
        self.tables, self._n_slots = tuple(tables), n_slots

    def _upload(self, slot: int, tensors: Tensors) -> None:
        for group, table in zip(self.layout.groups, self.tables, strict=True):
            data = self._packed(group, tensors)
            self.memory.views(table)(slot * group.slot_bytes, data.shape, np.uint8).update_inplace(data)

    def _packed(self, group: Group, tensors: Tensors) -> np.ndarray:
        """What an entry of `tensors` has in a group's table: bytes, `[slot_bytes]`."""
        data = np.empty(group.slot_bytes, np.uint8)
        places = data.reshape(len(group.entries), group.row_bytes)
        for place, entry, shape in zip(places, group.entries, group.shapes, strict=True):
            dtype, default = numpy_dtype(entry.dtype), self._defaults[entry.name]
            value, axis = tensors.get(entry.name, default), self._axes.get(entry.name)
            write_row(place.view(dtype).reshape(shape), value[0], axis, filler=filler_of(entry, dtype))
        return data
