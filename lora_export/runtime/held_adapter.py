"""`HeldAdapter`: an adapter that a session holds for one graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import onnxruntime as ort


class HeldAdapter:
    """The tensors of an adapter for one graph. Two of one name are two adapters: what is stacked goes by identity.

    Attributes:
        name: What `adapters` calls it.
        tensors: By input name, `[1, …]`; none if it leaves the graph as its base is.
        names: Of the inputs that it brings.
        invocation: The tokens that an activated LoRA waits for; None for one that is always active.
    """

    def __init__(self, name: str, tensors: Mapping[str, np.ndarray], invocation: Sequence[int] | None = None) -> None:
        self.name = name
        self.tensors = MappingProxyType(dict(tensors))
        self.names = frozenset(self.tensors)
        self.invocation = tuple(invocation) if invocation else None
        self._values: Mapping[str, ort.OrtValue] | None = None

    def on_device(self, make: Callable[[], Mapping[str, ort.OrtValue]]) -> Mapping[str, ort.OrtValue]:
        """What `make` gives: its inputs on the device where it serves a whole batch. Made once."""
        if self._values is None:
            self._values = make()
        return self._values

    def __str__(self) -> str:
        return self.name


# What one row runs: adapters with their weights, in a fixed order; empty for the base.
RowAdapters = tuple[tuple[HeldAdapter, float], ...]
