"""Queries, keys and values of GroupQueryAttention from one product, their weights side by side.

The operator reads them packed, `[batch, sequence, Σ out]`, and takes them apart itself. What adapters add to one of
them is put beside what they add to the others, and zeros where they add nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from lora_export.base.recipe import Recipe
from lora_export.graph.pack import is_packable, pack_weights
from lora_export.graph.packed_pairs import whole_of
from lora_export.graph.tape import Tape
from lora_export.graph.unbound import recipe_of


@dataclass(frozen=True)
class _Projection:
    """A product by a weight, and what is added to it: a bias `[out]`, and what an adapter adds."""

    product: ir.Node
    bias: ir.Value | None = None
    added: ir.Value | None = None


class ProjectionPacker:
    """Packs the projections of a graph's layers.

    Args:
        sizes: int64 `[2]`: the batch and the new tokens of a run.
        may: Which weights may be packed, by their recipe.
    """

    def __init__(self, graph: ir.Graph, sizes: ir.Value, may: Callable[[Recipe], bool] = lambda recipe: True) -> None:
        self._graph, self._sizes, self._may = graph, sizes, may
        self._zeros: dict[tuple[int, ir.DataType], ir.Value] = {}

    def packed(self, states: Sequence[ir.Value]) -> ir.Value | None:
        """`states`, each `[batch, sequence, out]`, side by side, by nodes at the graph's end; None where they are no
        projections of one input that nothing else reads."""
        found = [_projection(value) for value in states]
        if None in found or len({each.product.inputs[0] for each in found}) != 1:
            return None
        products = [each.product for each in found]
        if len(set(products)) != len(states) or not all(self._may(recipe_of(node.inputs[1])) for node in products):
            return None
        weight = pack_weights(self._graph, [node.inputs[1] for node in products])
        if weight is None:
            return None
        tape, width = Tape(self._graph, None), weight.shape[1]
        shape, dtype = [*states[0].shape[:2], width], states[0].dtype
        result = tape.op("MatMul", [products[0].inputs[0], weight], shape, dtype)
        biases = [each.bias for each in found]
        if any(bias is not None for bias in biases):
            zeros = [tape.constant(np.zeros(value.shape[2], dtype.numpy())) for value in states]
            beside = [zero if bias is None else bias for bias, zero in zip(biases, zeros, strict=True)]
            result = tape.op("Add", [result, tape.op("Concat", beside, [width], dtype, axis=0)], shape, dtype)
        added = [each.added for each in found]
        if any(term is not None for term in added):
            whole = None if None in added else whole_of(added)
            if whole is None:
                beside = [
                    self._zeros_like(each) if term is None else term for term, each in zip(added, states, strict=True)
                ]
                whole = tape.op("Concat", beside, shape, dtype, axis=2)
            result = tape.op("Add", [result, whole], shape, dtype)
        return result

    def _zeros_like(self, states: ir.Value) -> ir.Value:
        """Zeros of the shape of `states`, the same for all layers."""
        key = (states.shape[2], states.dtype)
        if key not in self._zeros:
            tape = Tape(self._graph, None)
            shape = tape.op("Concat", [self._sizes, tape.ints([states.shape[2]])], [3], ir.DataType.INT64, axis=0)
            zero = ir.tensor(np.zeros(1, states.dtype.numpy()))
            self._zeros[key] = tape.op("ConstantOfShape", [shape], states.shape, states.dtype, value=zero)
        return self._zeros[key]


def _projection(states: ir.Value) -> _Projection | None:
    """What `states`, `[batch, sequence, out]`, is, if nothing but one node reads it."""
    node = states.producer()
    if node is None or len(tuple(states.uses())) != 1 or states.shape is None or states.dtype is None:
        return None
    if is_packable(node):
        return _Projection(node)
    if node.op_type != "Add":
        return None
    for inner, term in (node.inputs, node.inputs[::-1]):
        found = _projection(inner)
        if found is None or term.shape is None:
            continue
        is_stored = term.is_initializer() and not term.is_graph_input()
        if is_stored and found.bias is None and list(term.shape) == [states.shape[2]]:
            return replace(found, bias=term)
        if not is_stored and found.added is None and list(term.shape)[1:] == list(states.shape)[1:]:
            return replace(found, added=term)
    return None
