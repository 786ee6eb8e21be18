"""`HeldAdapter`: an adapter that a session holds for one graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np


class HeldAdapter:
    """The tensors of an adapter for one graph. Two of one name are two adapters: what is stacked goes by identity.

    Attributes:
        name: What `adapters` calls it.
        tensors: By input name, `[1, …]`; none if it leaves the graph as its base is.
        invocation: The tokens that an activated LoRA waits for; None for one that is always active.
    """

    def __init__(self, name: str, tensors: Mapping[str, np.ndarray], invocation: Sequence[int] | None = None) -> None:
        self.name = name
        self.tensors = MappingProxyType(dict(tensors))
        self.invocation = tuple(invocation) if invocation else None

    def __str__(self) -> str:
        return self.name
