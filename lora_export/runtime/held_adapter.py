"""`HeldAdapter`: an adapter that a session holds for one graph."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import onnxruntime as ort

from lora_export.runtime.residency import Residency


class HeldAdapter:
    """The tensors of an adapter for one graph. Two of one name are two adapters: what is stacked goes by identity.

    Attributes:
        name: What `adapters` calls it.
        names: Of the inputs that it brings.
        n_bytes: Of its tensors.
        invocation: The tokens that an activated LoRA waits for; None for one that is always active.

    Args:
        tensors: By input name, `[1, …]`; none if it leaves the graph as its base is.
        read_again: Reads the same tensors again; without it, they stay in memory.
        residency: What bounds the memory; None for no bound.
    """

    def __init__(
        self,
        name: str,
        tensors: Mapping[str, np.ndarray],
        invocation: Sequence[int] | None = None,
        *,
        read_again: Callable[[], Mapping[str, np.ndarray]] | None = None,
        residency: Residency | None = None,
    ) -> None:
        self.name = name
        self.names = frozenset(tensors)
        self.n_bytes = sum(array.nbytes for array in tensors.values())
        self.invocation = tuple(invocation) if invocation else None
        self._tensors: Mapping[str, np.ndarray] | None = MappingProxyType(dict(tensors))
        self._values: Mapping[str, ort.OrtValue] | None = None
        self._read_again, self._residency = read_again, residency
        self._reading = threading.Lock()
        self.use()

    @property
    def tensors(self) -> Mapping[str, np.ndarray]:
        """By input name, `[1, …]`; read again if they were dropped.

        Raises:
            InputRefused: The file is not what it was.
            UsageProblem: They do not fit into the session's bound.
        """
        tensors = self._tensors
        if tensors is None:
            with self._reading:
                tensors = self._tensors
                if tensors is None:
                    tensors = self._tensors = MappingProxyType(dict(self._read_again()))
        self.use()
        return tensors

    @property
    def is_loaded(self) -> bool:
        return self._tensors is not None

    @property
    def can_be_dropped(self) -> bool:
        return self._read_again is not None

    def drop(self) -> None:
        """Let the tensors go; who has them keeps them."""
        self._tensors = None
        self._values = None

    def on_device(self, make: Callable[[], Mapping[str, ort.OrtValue]]) -> Mapping[str, ort.OrtValue]:
        """What `make` gives: its inputs on the device where it serves a whole batch. Kept while the tensors are."""
        values = self._values
        if values is None:
            values = self._values = make()
            if self._tensors is None:  # dropped meanwhile
                self._values = None
        else:
            self.use()
        return values

    def use(self) -> None:
        """Say that it is used now: its tensors, if they are in memory, are dropped later than those of others."""
        if self._residency is not None:
            self._residency.used(self)

    def __str__(self) -> str:
        return self.name


# What one row runs: adapters with their weights, in a fixed order; empty for the base.
RowAdapters = tuple[tuple[HeldAdapter, float], ...]
# The same, without keeping its adapters alive. Those of adapters that are gone equal no others.
RowKey = tuple[tuple[weakref.ref[HeldAdapter], float], ...]


def row_key(row: RowAdapters) -> RowKey:
    """What tells a row from rows that run something else."""
    return tuple((weakref.ref(adapter), weight) for adapter, weight in row)
