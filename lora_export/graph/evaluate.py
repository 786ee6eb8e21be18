"""Run the nodes that compute a value. So a pass finds out what a graph does, without patterns of its nodes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx_ir.convenience import extract

# A constant of more numbers is a table, whose axes have sizes of their own.
_FEW = 16
# What ONNX's reference evaluator raises for an operator that it has not, or operands that it does not take. The graph
# then keeps its own mask, which is right and slower.
_CANNOT_RUN = (ValueError, TypeError, KeyError, IndexError, NotImplementedError, RuntimeError)


class Evaluator:
    """Runs a copy of the nodes that compute a value from the graph's inputs.

    Attributes:
        inputs: What they read of the graph's inputs, copies too.
    """

    def __init__(self, model: ir.Model) -> None:
        self.inputs, self._nodes = tuple(model.graph.inputs), tuple(model.graph)
        self._evaluator = ReferenceEvaluator(ir.to_proto(model))

    @classmethod
    def of(cls, graph: ir.Graph, value: ir.Value) -> Evaluator | None:
        """For the nodes of `graph` that compute `value`; None where they read a weight or have no reference."""
        read = read_by(value)
        inputs = [each for each in read if each.producer() is None]
        has_domains = any(node.domain for node in {each.producer() for each in read} - {None})
        if has_domains or any(each not in graph.inputs for each in inputs):
            return None
        try:
            model = ir.Model(extract(graph, inputs, [value]), ir_version=10)
            model.opset_imports.update(graph.opset_imports)
            return cls(model)
        except _CANNOT_RUN:
            return None

    def largest_number(self, below: int) -> int:
        """The largest whole number below `below` among the constants, 0 if there is none: no window is larger. What
        stands for minus infinity in a dtype is no number."""
        constants = (ir.convenience.get_const_tensor(value) for node in self._nodes for value in node.inputs if value)
        arrays = (tensor.numpy().reshape(-1) for tensor in constants if tensor is not None and tensor.size <= _FEW)
        numbers = (abs(float(number)) for array in arrays for number in array[~_is_lowest(array)])
        return max((int(number) for number in numbers if number < below), default=0)

    def __call__(self, sizes: Mapping[str, int], given: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """The value as its nodes compute it; None if they cannot be run here.

        Args:
            sizes: Of the symbolic axes of inputs, by name.
            given: The inputs that are not zeros; those that the value does not read are left out.
        """
        feeds = {}
        for value in self.inputs:
            dims = [dim if isinstance(dim, int) else sizes[str(dim.value)] for dim in value.shape]
            feeds[value.name] = given[value.name] if value.name in given else np.zeros(dims, value.dtype.numpy())
        try:
            (found,) = self._evaluator.run(None, feeds)
        except _CANNOT_RUN:
            return None
        return found


def _is_lowest(array: np.ndarray) -> np.ndarray:
    if not np.issubdtype(array.dtype, np.floating):
        return np.zeros(array.shape, bool)
    return array == np.finfo(array.dtype).min


def read_by(value: ir.Value) -> list[ir.Value]:
    """`value`, and all values that it is computed from but constants."""
    found: dict[ir.Value, None] = {}
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if each in found or each.const_value is not None:
            continue
        found[each] = None
        if each.producer() is not None:
            waiting += [operand for operand in each.producer().inputs if operand is not None]
    return list(found)
