"""A range that a length is added to starts at that length, for graphs that run on a GPU.

`Add(Range(a, b, step), n)`, with `n` a scalar computed from shapes, becomes `Range(a + n, b + n, step)`.

ONNX Runtime computes shapes on the CPU, and `Range` reads its operands there. The `Add` runs on the GPU, so `n` is
copied to it at every run. One such copy is enough for ONNX Runtime to refuse a CUDA graph, and every decoder had one:
the positions of its new tokens, after those of the cache.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.convenience import replace_nodes_and_values

# What computes a shape from shapes.
_ARITHMETIC = frozenset({"Squeeze", "Unsqueeze", "Add", "Sub", "Mul", "Gather", "Reshape", "Concat", "Cast"})


def start_ranges_at_sums(model: ir.Model) -> ir.Model:
    """Rewrite every such `Add` in `model` (changed in place and returned)."""
    graph = model.graph
    for node in list(graph):
        if node.op_type != "Add" or node.domain != "":
            continue
        for counted, length in (node.inputs, node.inputs[::-1]):
            ranged = counted.producer()
            if ranged is not None and ranged.op_type == "Range" and _is_scalar_of_shapes(length):
                _rewrite(graph, node, ranged, length=length)
                break
    return model


def _is_scalar_of_shapes(value: ir.Value) -> bool:
    return value.shape is not None and len(value.shape) == 0 and _is_of_shapes(value)


def _is_of_shapes(value: ir.Value) -> bool:
    """Whether `value` is computed from shapes and constants, from at least one shape."""
    producer = value.producer()
    if producer is None:
        return False
    if producer.op_type == "Shape":
        return True
    operands = [each for each in producer.inputs if each is not None and each.const_value is None]
    return producer.op_type in _ARITHMETIC and bool(operands) and all(map(_is_of_shapes, operands))


def _rewrite(graph: ir.Graph, node: ir.Node, ranged: ir.Node, *, length: ir.Value) -> None:
    start, limit, step = ranged.inputs
    added = []

    def plus(value: ir.Value) -> ir.Value:
        if value.const_value is not None and value.const_value.numpy() == 0:
            return length
        total = ir.node("Add", [value, length])
        total.outputs[0].dtype, total.outputs[0].shape = length.dtype, ir.Shape([])
        added.append(total)
        return total.outputs[0]

    shifted = ir.node("Range", [plus(start), plus(limit), step])
    replace_nodes_and_values(graph, node, [node], [*added, shifted], node.outputs, shifted.outputs)
