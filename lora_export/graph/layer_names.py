"""The names of a stack of layers: which layer a name is of, and the names of all layers for those of a few.

A graph of a stack's traced layers has four units: the first layers, two periods, and the last layers. The two periods
are compared, and the second of them is copied.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from lora_export.base.layers import Stack
from lora_export.contract import AdapterInput
from lora_export.graph.derived import Derived
from lora_export.site_choice import SiteChoice

T = TypeVar("T")
UNITS = FIRST, FIRST_OF_TWO, COPIED, LAST = range(4)


class LayerNames:
    """The names of a stack's parts, by the number of their layer."""

    def __init__(self, stack: Stack) -> None:
        self._pattern = re.compile(rf"(?<![\w.])({re.escape(stack.path)}|past_key_values|present)\.(\d+)(?!\w)")
        self._stack = stack

    def layer(self, name: str) -> int | None:
        """The layer that `name` is of; None if it is of none, or of several."""
        found = {int(match[2]) for match in self._pattern.finditer(name)}
        return found.pop() if len(found) == 1 else None

    def unit(self, name: str) -> int | None:
        """The unit that `name`, of a graph of the traced layers, is of."""
        layer = self.layer(name)
        if layer is None or layer < self._stack.n_first:
            return None if layer is None else FIRST
        return min(FIRST_OF_TWO + (layer - self._stack.n_first) // self._stack.period, LAST)

    def shifted(self, name: str, by: int) -> str:
        """`name`, of the layer `by` above its own instead."""
        return self._pattern.sub(lambda match: f"{match[1]}.{int(match[2]) + by}", name)

    def shifted_shape(self, shape: ir.Shape | None, by: int) -> ir.Shape | None:
        """`shape`, its symbolic axes those of the layer `by` above."""
        if shape is None:
            return None
        dims = [dim if isinstance(dim, int) or dim.value is None else self.shifted(str(dim.value), by) for dim in shape]
        return ir.Shape(dims)


def is_uniform(names: Iterable[str], stack: Stack) -> bool:
    """Whether `names` hold the same of each layer, but the first, as of the one `stack.period` before it."""
    of = LayerNames(stack)
    found: dict[int, set[str]] = {layer: set() for layer in range(stack.n_layers)}
    for name in names:
        if (layer := of.layer(name)) is not None:
            found[layer].add(of.shifted(name, -layer))
    later = range(stack.n_first + stack.period, stack.n_layers)
    return all(found[layer] == found[layer - stack.period] for layer in later)


def traced_choice(choice: SiteChoice, stack: Stack) -> SiteChoice:
    """What of `choice` is in the traced layers; the last of them stand for the stack's last."""
    names = LayerNames(stack)

    def is_traced(module: str) -> bool:
        layer = names.layer(module)
        return layer is None or layer < stack.n_traced

    return SiteChoice(**{what: tuple(filter(is_traced, modules)) for what, modules in asdict(choice).items()})


def stand_ins(small: Mapping[str, np.ndarray], stack: Stack) -> dict[str, np.ndarray]:
    """`small` with other numbers in place of those of the layers of `stack`, no two alike in their dtype, and none of
    ones alone: equal constants would be made one, and a product with ones dropped."""
    names, rng = LayerNames(stack), np.random.default_rng(list(stack.path.encode()))
    seen: set[tuple[tuple[int, ...], bytes]] = set()

    def other(array: np.ndarray) -> np.ndarray:
        width = 1.0
        while True:
            found = (1 + width * rng.random(array.shape)).astype(array.dtype)
            key = (found.shape, found.tobytes())
            if not found.size or (key not in seen and not np.all(found == 1)):
                seen.add(key)
                return found
            width += 1.0  # a number in bfloat16 has 128 values between 1 and 2

    return {name: array if names.layer(name) is None else other(array) for name, array in small.items()}


def derived_of_all(
    derived: Iterable[Derived], small: Mapping[str, np.ndarray], stack: Stack
) -> dict[str, np.ndarray] | None:
    """The constants of all layers of `stack` that are made as those of the traced ones are, of their own parameters;
    None where traced layers make them in different ways."""
    names, found = LayerNames(stack), {}
    for each in derived:
        layer = names.layer(each.parameter)
        for by in () if layer is None else range(-layer, stack.n_layers - layer):
            parameter = names.shifted(each.parameter, by)
            if parameter in small:
                name, array = names.shifted(each.name, by), each.of(small[parameter])
                if not np.array_equal(found.setdefault(name, array), array, equal_nan=True):
                    return None
    return found


def stamped_inputs(inputs: Sequence[AdapterInput], stack: Stack) -> tuple[AdapterInput, ...]:
    """The adapter inputs of all layers of `stack`, for those of a graph of its traced layers."""
    names = LayerNames(stack)

    def shifted(entry: AdapterInput, by: int) -> AdapterInput:
        dims = tuple(names.shifted(dim, by) if isinstance(dim, str) else dim for dim in entry.dims)
        parts = tuple(replace(part, module=names.shifted(part.module, by)) for part in entry.parts)
        name, module = names.shifted(entry.name, by), names.shifted(entry.module, by)
        return replace(entry, name=name, module=module, dims=dims, parts=parts)

    return tuple(expanded(inputs, lambda entry: names.unit(entry.name), shifted, stack=stack))


def expanded(
    items: Iterable[T], unit_of: Callable[[T], int | None], shifted: Callable[[T, int], T], *, stack: Stack
) -> list[T]:
    """`items` with those of every layer: each run of the unit that is copied is followed by its copies."""
    found: list[T] = []
    run: list[T] = []
    for item in [*items, None]:
        unit = None if item is None else unit_of(item)
        if unit == COPIED:
            run.append(item)
            continue
        found += run + [shifted(each, by) for by in stack.copies for each in run]
        run = []
        if item is not None:
            found.append(shifted(item, stack.copies[-1]) if unit == LAST else item)
    return found
