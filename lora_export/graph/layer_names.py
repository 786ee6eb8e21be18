"""The names of a stack of layers: which layer a name is of, and the names of all layers for those of a few.

A graph of `N_TRACED` layers has a first, two that are compared (the second of which is copied), and a last.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from lora_export.base.layers import N_TRACED, Stack
from lora_export.contract import AdapterInput, SiteChoice

T = TypeVar("T")
FIRST_OF_TWO, COPIED, LAST = N_TRACED - 3, N_TRACED - 2, N_TRACED - 1


class LayerNames:
    """The names of a stack's parts, by the number of their layer."""

    def __init__(self, stack: Stack) -> None:
        self._pattern = re.compile(rf"(?<![\w.])({re.escape(stack.path)}|past_key_values|present)\.(\d+)(?!\w)")

    def layer(self, name: str) -> int | None:
        """The layer that `name` is of; None if it is of none, or of several."""
        found = {int(match[2]) for match in self._pattern.finditer(name)}
        return found.pop() if len(found) == 1 else None

    def moved(self, name: str, layer: int) -> str:
        """`name`, of layer `layer` instead of its own."""
        return self._pattern.sub(lambda match: f"{match[1]}.{layer}", name)

    def moved_shape(self, shape: ir.Shape | None, layer: int) -> ir.Shape | None:
        """`shape`, its symbolic axes those of layer `layer`."""
        if shape is None:
            return None
        dims = [
            dim if isinstance(dim, int) or dim.value is None else self.moved(str(dim.value), layer) for dim in shape
        ]
        return ir.Shape(dims)


def is_uniform(names: Iterable[str], stack: Stack) -> bool:
    """Whether `names` hold the same of all layers but the first."""
    of, found = LayerNames(stack), {layer: set() for layer in range(stack.n_layers)}
    for name in names:
        if (layer := of.layer(name)) is not None:
            found[layer].add(of.moved(name, 0))
    return all(found[layer] == found[1] for layer in range(2, stack.n_layers))


def traced_choice(choice: SiteChoice, stack: Stack) -> SiteChoice:
    """What of `choice` is in the traced layers; the last of them stands for the stack's last."""
    names = LayerNames(stack)

    def is_traced(module: str) -> bool:
        layer = names.layer(module)
        return layer is None or layer < N_TRACED

    return SiteChoice(**{what: tuple(filter(is_traced, modules)) for what, modules in asdict(choice).items()})


def stand_ins(small: Mapping[str, np.ndarray], stack: Stack) -> dict[str, np.ndarray]:
    """`small` with other numbers in place of those of the layers of `stack`, no two alike."""
    names, rng = LayerNames(stack), np.random.default_rng(0)
    return {
        name: array if names.layer(name) is None else (1 + rng.random(array.shape)).astype(array.dtype)
        for name, array in small.items()
    }


def stamped_inputs(inputs: Sequence[AdapterInput], stack: Stack) -> tuple[AdapterInput, ...]:
    """The adapter inputs of all layers, for those of a graph of `N_TRACED`."""
    names = LayerNames(stack)

    def moved(entry: AdapterInput, layer: int) -> AdapterInput:
        dims = tuple(names.moved(dim, layer) if isinstance(dim, str) else dim for dim in entry.dims)
        module = names.moved(entry.module, layer)
        return replace(entry, name=names.moved(entry.name, layer), module=module, dims=dims)

    return tuple(expanded(inputs, lambda entry: names.layer(entry.name), moved, n_layers=stack.n_layers))


def expanded(
    items: Iterable[T], layer_of: Callable[[T], int | None], moved: Callable[[T, int], T], *, n_layers: int
) -> list[T]:
    """`items` with those of every layer: each run of the last but one is followed by its copies."""
    found: list[T] = []
    run: list[T] = []
    for item in [*items, None]:
        layer = None if item is None else layer_of(item)
        if layer == COPIED:
            run.append(item)
            continue
        found += run + [moved(each, n) for n in range(COPIED + 1, n_layers - 1) for each in run if run]
        run = []
        if item is not None:
            found.append(moved(item, n_layers - 1) if layer == LAST else item)
    return found
