"""A module that a given graph has taken apart into products of some of its rows each, made one product again.

GenAI's model builder writes Phi-3's `gate_up_proj` as two products, one for the gate and one for the rest. An adapter
adds to the module's whole output. So one product takes the place of the two, and their readers read its `Split`. Each
row of integers has its own blocks, scales and zeros, so no number changes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import onnx_ir as ir

from lora_export.graph.matching import PARTS, BaseMatrix, GivenWeight, Matcher
from lora_export.graph.unpacking import product_before


def join(
    graph: ir.Graph,
    weights: Sequence[GivenWeight],
    matrices: Sequence[BaseMatrix],
    *,
    matcher: Matcher,
    modules: Collection[str],
) -> list[GivenWeight]:
    """`weights` with those that are together the rows of one of `modules` joined, in `graph` (changed in place)."""
    found = list(weights)
    whole = {each.module for weight in weights for each in weight.modules}
    for matrix in matrices:
        if matrix.module not in modules or matrix.module in whole or matrix.is_table:
            continue
        nobodys = [weight for weight in found if not weight.modules and _is_a_product(weight)]
        parts = matcher.parts_of(matrix, nobodys)
        if parts and len({_kind(weight) for weight in parts}) == 1:
            joined = _joined(graph, matrix, parts)
            found = [joined if weight is parts[0] else weight for weight in found if weight not in parts[1:]]
    return found


def _is_a_product(weight: GivenWeight) -> bool:
    """Whether one node multiplies by it and does nothing else."""
    node = weight.node
    others = node.inputs[4:] if weight.is_integers else node.inputs[2:]
    is_alone = len(weight.nodes) == 1 and len(tuple(weight.value.uses())) == 1
    return weight.is_product and is_alone and not any(others) and not node.outputs[0].is_graph_output()


def _kind(weight: GivenWeight) -> tuple:
    """What parts of one module have in common: their input, and how they are stored."""
    node = weight.node
    attributes = sorted((name, str(each.value)) for name, each in node.attributes.items() if name != "N")
    stored = tuple(value is not None for value in node.inputs[1:4])
    is_transposed = node.inputs[1].producer() is not None
    return (id(node.inputs[0]), node.op_type, weight.value.dtype, is_transposed, stored, tuple(attributes))


def _joined(graph: ir.Graph, matrix: BaseMatrix, parts: Sequence[GivenWeight]) -> GivenWeight:
    nodes = [weight.node for weight in parts]
    first = next(node for node in graph if node in nodes)
    operands = _rows_together(graph, matrix, parts)
    product = product_before(graph, first, matrix, operands=operands)
    sizes = ir.Value(name=f"{matrix.module}.sizes", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([len(parts)]))
    sizes.const_value = ir.tensor(np.array([weight.n_out for weight in parts], np.int64), name=sizes.name)
    graph.initializers[sizes.name] = sizes
    split = ir.node("Split", [product.outputs[0], sizes], attributes={"axis": -1}, num_outputs=len(parts))
    graph.insert_before(first, split)
    for weight, part in zip(parts, split.outputs, strict=True):
        old = weight.node.outputs[0]
        part.shape, part.dtype = old.shape, old.dtype
        old.replace_all_uses_with(part)
        gone = [value for value in weight.node.inputs[1:] if value is not None]
        transpose = weight.node.inputs[1].producer()
        graph.remove(weight.node, safe=True)
        if transpose is not None:
            gone = [transpose.inputs[0]]
            graph.remove(transpose, safe=True)
        for value in gone:
            graph.initializers.pop(value.name, None)
    return GivenWeight(operands[0], matrix.n_in, matrix.n_out, parts[0].is_out_in, [product], (matrix,))


def _rows_together(graph: ir.Graph, matrix: BaseMatrix, parts: Sequence[GivenWeight]) -> list[ir.Value | None]:
    """What the product of all rows reads in the places from 1 on: one weight, or integers, scales and zeros."""
    path, weight = f"{matrix.module}.weight", parts[0]
    if not weight.is_integers:
        shape = [matrix.n_out, matrix.n_in] if weight.is_out_in else [matrix.n_in, matrix.n_out]
        value = ir.Value(name=path, type=ir.TensorType(weight.value.dtype), shape=ir.Shape(shape))
        graph.initializers[path] = value
        return [value]
    found: list[ir.Value | None] = []
    bits = weight.node.attributes.get_int("bits", 4)
    for place, suffix in PARTS.items():
        given = [each.node.inputs[place] if place < len(each.node.inputs) else None for each in parts]
        if None in given:
            found.append(None)
            continue
        array = np.concatenate([value.const_value.numpy() for value in given])
        value = ir.Value(name=path + suffix.format(bits=bits), type=given[0].type, shape=ir.Shape(array.shape))
        value.const_value = ir.tensor(array, dtype=given[0].dtype, name=value.name)
        graph.initializers[value.name] = value
        found.append(value)
    return found
