"""Pairs of several modules in one: what an adapter input that serves more than one module is made of.

Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class PackedPart:
    """A module whose pair is a part of a packed one: B's next `out_features` columns are its own."""

    module: str
    out_features: int


def packed_name(modules: Iterable[str]) -> str:
    """What the inputs of `modules`, which have one parent, are called after: `<parent>.q_proj+k_proj+v_proj`."""
    names = list(modules)
    parent = names[0].rpartition(".")[0]
    children = "+".join(name.rpartition(".")[2] for name in names)
    return f"{parent}.{children}" if parent else children
