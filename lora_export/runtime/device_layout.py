"""How the adapter inputs of a row lie in a bank on the device: in groups of inputs whose rows take as many bytes."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lora_export.contract import AdapterInput
from lora_export.runtime.arrays import numpy_dtype
from lora_export.runtime.device_memory import MOST_WORDS_OF_A_TABLE, word_of
from lora_export.runtime.stacking import Tensors

# Where a group's inputs begin: kernels read sixteen bytes at a time.
_ALIGNMENT = 16
# The most bytes of a row in one group, so that a table may have many rows.
_MOST_BYTES = 2**23


@dataclass(frozen=True)
class Group:
    """Inputs that lie in a table, `[slots, inputs, row_bytes]`, and for `n` rows in a buffer, `[inputs, n, row_bytes]`.

    Attributes:
        shapes: Of a row of each, without an axis of rows.
        row_bytes: Of a row of each.
    """

    entries: tuple[AdapterInput, ...]
    shapes: tuple[tuple[int, ...], ...]
    row_bytes: int

    @property
    def slot_bytes(self) -> int:
        return len(self.entries) * self.row_bytes


@dataclass(frozen=True, eq=False)
class Layout:
    """The groups of one bank.

    Attributes:
        names: Of the inputs that it was made for; those that hold nothing are in no group.
        sizes: Of those in which adapters differ, along their axis.
    """

    names: frozenset[str]
    sizes: Mapping[str, int]
    groups: tuple[Group, ...]

    @property
    def slot_bytes(self) -> int:
        """What one entry of the bank takes."""
        return sum(group.slot_bytes for group in self.groups)

    @property
    def most_slots(self) -> int:
        """What ONNX Runtime can address."""
        words = [group.slot_bytes // word_of(group.row_bytes).itemsize for group in self.groups]
        return MOST_WORDS_OF_A_TABLE // max(words, default=1)

    @functools.cached_property
    def _places(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each input, group by group, `[inputs, 1]`: the inputs of its group, and its own place among them."""
        counts = [len(group.entries) for group in self.groups]
        return np.repeat(counts, counts)[:, None], np.concatenate([np.arange(n) for n in (0, *counts)])[:, None]

    def places(self, slots: Sequence[int]) -> np.ndarray:
        """Which rows of their groups' tables the inputs of a batch are, int64 `[inputs, len(slots)]`."""
        counts, own = self._places
        return np.asarray(slots, np.int64) * counts + own


def layout_of(
    entries: Sequence[AdapterInput], names: frozenset[str], sizes: Mapping[str, int], *, defaults: Tensors
) -> Layout:
    """The layout of those of `entries` that `names` names.

    Args:
        sizes: Of those in which adapters differ, along their axis; 0 is left out.
        defaults: What each is fed where no adapter brings it, `[1, …]`.
    """
    found: dict[int | str, list[tuple[AdapterInput, tuple[int, ...], int]]] = {}
    for entry in (entry for entry in entries if entry.name in names):
        shape = list(defaults[entry.name].shape[1:])
        if entry.name in sizes:
            shape[entry.spec.axis - 1] = sizes[entry.name]
        row_bytes = math.prod(shape) * numpy_dtype(entry.dtype).itemsize
        if row_bytes:
            key = entry.name if row_bytes % _ALIGNMENT else row_bytes
            found.setdefault(key, []).append((entry, tuple(shape), row_bytes))
    groups = []
    for members in found.values():
        row_bytes = members[0][2]
        n = max(1, _MOST_BYTES // row_bytes)
        for part in (members[first : first + n] for first in range(0, len(members), n)):
            groups.append(Group(tuple(each[0] for each in part), tuple(each[1] for each in part), row_bytes))
    return Layout(names, sizes, tuple(groups))
