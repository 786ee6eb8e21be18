"""What a model makes of a norm's weight before it multiplies by it, as a constant that goes by the weight's name.

Gemma's norms multiply by 1 + weight. Constant folding would make a constant of each, with a name that tells no layer,
and `stamp.py`, which copies layers, could not tell one layer's constant from another's. Here the constant's name is the
weight's path and the operators that made it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

_SUMS = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply}


@dataclass(frozen=True)
class Derived:
    """A constant that a bound parameter is made into.

    Attributes:
        name: Its initializer's: the parameter's path, and the operators after it.
        parameter: The parameter's path.
        steps: What is done to it, one after the other.
    """

    name: str
    parameter: str
    steps: tuple[Callable[[np.ndarray], np.ndarray], ...]

    def of(self, array: np.ndarray) -> np.ndarray:
        """It for the parameter `array`."""
        for step in self.steps:
            array = step(array)
        return array


def fold_derived(model: ir.Model, small: Mapping[str, np.ndarray]) -> tuple[Derived, ...]:
    """Make constants of what `model` (changed in place) computes of one of the bound parameters `small` and numbers.

    Cast, and sums and products with one number, are what models do.
    """
    graph = model.graph
    found: dict[ir.Value, Derived] = {}
    for node in list(graph):
        made = _derived(node, found, small)
        if made is None:
            continue
        value = ir.Value(name=made.name)
        array = made.of(small[made.parameter])
        value.const_value = ir.tensor(array, dtype=node.outputs[0].dtype, name=made.name)
        value.shape, value.dtype = value.const_value.shape, value.const_value.dtype
        found[value] = made
        graph.initializers[made.name] = value
        node.outputs[0].replace_all_uses_with(value)
        graph.remove(node, safe=True)
    return tuple(found.values())


def _derived(node: ir.Node, found: Mapping[ir.Value, Derived], small: Mapping[str, np.ndarray]) -> Derived | None:
    """What `node` makes of a bound parameter; None if that is not what it does, or its name is taken."""
    graph = node.graph
    if node.domain or len(node.outputs) != 1 or node.outputs[0].is_graph_output() or node.outputs[0].dtype is None:
        return None
    bound = [value for value in node.inputs if value in found or _is_bound(value, small)]
    of = bound[0] if len(bound) == 1 else None  # of two, one would be taken for a number that all layers have
    step = None if of is None else _step(node, of)
    if step is None:
        return None
    before = found.get(of, Derived(of.name, of.name, ()))
    name = f"{before.name}.{node.op_type}"
    return None if name in graph.initializers else Derived(name, before.parameter, (*before.steps, step))


def _is_bound(value: ir.Value | None, small: Mapping[str, np.ndarray]) -> bool:
    return value is not None and value.is_initializer() and value.const_value is not None and value.name in small


def _step(node: ir.Node, of: ir.Value) -> Callable[[np.ndarray], np.ndarray] | None:
    if node.op_type == "Cast":
        dtype = node.outputs[0].dtype.numpy()
        return lambda array: array.astype(dtype)
    if node.op_type not in _SUMS or len(node.inputs) != 2 or node.inputs[0] is node.inputs[1]:
        return None
    is_first = node.inputs[0] is of
    other = ir.convenience.get_const_tensor(node.inputs[1] if is_first else node.inputs[0])
    if other is None or other.size != 1:
        return None
    number, function = other.numpy().reshape(()), _SUMS[node.op_type]
    return (lambda array: function(array, number)) if is_first else (lambda array: function(number, array))
