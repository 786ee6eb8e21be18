"""Projections that a given graph has packed into one product, taken apart for adapters.

Each projection gets a product of its own, beside which an adapter can add its own. The readers of the packed product
read the parts:

1. `GroupQueryAttention` with query, key and value in its first input takes three (floats are packed again afterwards);
2. a `Split` at the same sizes goes;
3. anything else reads their `Concat`.

Each row of integers has its own blocks, scales and zeros, so no number changes. A part of a float weight has no numbers
until `name_weights` says whose it is.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from lora_export.graph.attention_node import GROUPED
from lora_export.graph.matching import PARTS, BaseMatrix, GivenWeight
from lora_export.graph.sites import bias_inside


def unpack(graph: ir.Graph, weights: Sequence[GivenWeight], modules: Collection[str]) -> list[GivenWeight]:
    """`weights` with those that hold one of `modules` among others taken apart, in `graph` (changed in place)."""
    found: list[GivenWeight] = []
    for weight in weights:
        is_chosen = len(weight.modules) > 1 and any(each.module in modules for each in weight.modules)
        is_inside = weight.is_product and not any(node.outputs[0].is_graph_output() for node in weight.nodes)
        found += _apart(graph, weight) if is_chosen and is_inside else [weight]
    return found


def _apart(graph: ir.Graph, weight: GivenWeight) -> list[GivenWeight]:
    parts = []
    operands = _split_weights(graph, weight)
    for node in list(weight.nodes):
        products = [
            product_before(graph, node, each, operands=operand)
            for each, operand in zip(weight.modules, operands, strict=True)
        ]
        parts.append(products)
        _replace(
            graph, node, [product.outputs[0] for product in products], sizes=[each.n_out for each in weight.modules]
        )
    graph.initializers.pop(weight.value.name, None)
    return [
        replace(weight, value=operand[0], n_out=each.n_out, nodes=[products[i] for products in parts], modules=(each,))
        for i, (each, operand) in enumerate(zip(weight.modules, operands, strict=True))
    ]


def _split_weights(graph: ir.Graph, weight: GivenWeight) -> list[list[ir.Value | None]]:
    """For each module, what its product reads in the places from 1 on, but a bias: one weight, or integers, scales and
    zeros."""
    found, start = [], 0
    for each in weight.modules:
        path, rows = f"{each.module}.weight", slice(start, start + each.n_out)
        if weight.is_integers:
            found.append(_rows_of_integers(graph, weight.node, path, rows=rows))
        else:
            shape = [each.n_out, each.n_in] if weight.is_out_in else [each.n_in, each.n_out]
            value = ir.Value(name=path, type=ir.TensorType(weight.value.dtype), shape=ir.Shape(shape))
            graph.initializers[path] = value
            found.append([value])
        start += each.n_out
    return found


def _rows_of_integers(graph: ir.Graph, node: ir.Node, path: str, *, rows: slice) -> list[ir.Value | None]:
    n_out, bits = node.attributes.get_int("N"), node.attributes.get_int("bits", 4)
    found: list[ir.Value | None] = []
    for place, suffix in PARTS.items():
        given = node.inputs[place] if place < len(node.inputs) else None
        if given is None:
            found.append(None)
            continue
        array = given.const_value.numpy()
        part = np.ascontiguousarray(array.reshape(n_out, -1, *array.shape[2:])[rows] if array.ndim < 3 else array[rows])
        part = part if array.ndim > 1 else part.reshape(-1)
        name = path + suffix.format(bits=bits)
        value = ir.Value(name=name, type=given.type, shape=ir.Shape(part.shape))
        value.const_value = ir.tensor(part, dtype=given.dtype, name=value.name)
        graph.initializers[value.name] = value
        found.append(value)
    return found


def product_before(graph: ir.Graph, node: ir.Node, each: BaseMatrix, *, operands: Sequence[ir.Value | None]) -> ir.Node:
    """The product of one module, before `node`, which multiplies by it and others, or by some of its rows."""
    attributes = dict(node.attributes)
    if node.op_type == "MatMulNBits":
        attributes["N"] = ir.AttrInt64("N", each.n_out)
    operand = list(operands)
    producer = node.inputs[1].producer()
    if producer is not None:  # the packed weight is read through a Transpose
        transpose = ir.node("Transpose", [operand[0]], attributes={"perm": [1, 0]})
        transpose.outputs[0].dtype = operand[0].dtype
        transpose.outputs[0].shape = ir.Shape(list(reversed(operand[0].shape)))
        graph.insert_before(node, transpose)
        operand = [transpose.outputs[0]]
    product = ir.node(
        node.op_type, [node.inputs[0], *operand], attributes=attributes, domain=node.domain,
        name=f"{node.name}.{each.module}",
    )  # fmt: skip
    packed, output = node.outputs[0], product.outputs[0]
    output.name = f"{packed.name}.{each.module}"
    output.dtype = packed.dtype
    output.shape = None if packed.shape is None else ir.Shape([*list(packed.shape)[:-1], each.n_out])
    graph.insert_before(node, product)
    return product


def _replace(graph: ir.Graph, node: ir.Node, outputs: list[ir.Value], *, sizes: list[int]) -> None:
    """Let what reads the packed product `node` read `outputs`; a packed bias is taken apart with it."""
    outputs, last = _with_bias(graph, node, outputs, sizes=sizes)
    users = list(last.outputs[0].uses())
    reads = [
        (user, index) for user, index in users if not _takes_apart(graph, user, index, outputs=outputs, sizes=sizes)
    ]
    if reads:
        joined = ir.node("Concat", outputs, attributes={"axis": -1})
        joined.outputs[0].dtype, joined.outputs[0].shape = last.outputs[0].dtype, last.outputs[0].shape
        graph.insert_after(last, joined)
        for user, index in reads:
            user.replace_input_with(index, joined.outputs[0])
    for gone in dict.fromkeys((last, node)):
        graph.remove(gone, safe=True)


def _with_bias(
    graph: ir.Graph, node: ir.Node, outputs: list[ir.Value], *, sizes: list[int]
) -> tuple[list[ir.Value], ir.Node]:
    """`outputs` with their parts of a packed bias added, and the last node of the packed product."""
    inside = bias_inside(node)
    users = list(node.outputs[0].uses())
    add = users[0][0] if len(users) == 1 and users[0][0].op_type == "Add" else None
    bias = next((v for v in add.inputs if v is not None and v.const_value is not None), None) if add else None
    last = node
    if inside is not None:
        bias = inside
    elif bias is None or bias.shape is None or list(bias.shape) != [sum(sizes)]:
        return outputs, node
    else:
        last = add
    found = []
    for output, part in zip(outputs, np.split(bias.const_value.numpy(), np.cumsum(sizes)[:-1], axis=-1), strict=True):
        value = ir.Value(name=f"{output.name}.bias", type=bias.type, shape=ir.Shape(part.shape))
        value.const_value = ir.tensor(np.ascontiguousarray(part), dtype=bias.dtype, name=value.name)
        graph.initializers[value.name] = value
        added = ir.node("Add", [output, value])
        added.outputs[0].dtype, added.outputs[0].shape = output.dtype, output.shape
        graph.insert_before(last, added)
        found.append(added.outputs[0])
    return found, last


def _takes_apart(graph: ir.Graph, user: ir.Node, index: int, *, outputs: list[ir.Value], sizes: list[int]) -> bool:
    """Let `user` read the parts, if it is of cases 1 and 2."""
    if user.op_type == GROUPED and index == 0 and len(outputs) == 3 and user.inputs[1] is None:
        for place, output in enumerate(outputs):
            user.replace_input_with(place, output)
        return True
    if user.op_type == "Split" and index == 0 and _split_sizes(user) == sizes:
        for old, new in zip(user.outputs, outputs, strict=True):
            for reader, place in list(old.uses()):
                reader.replace_input_with(place, new)
        graph.remove(user, safe=True)
        return True
    return False


def _split_sizes(split: ir.Node) -> list[int] | None:
    given = split.inputs[1] if len(split.inputs) > 1 else None
    shape = split.inputs[0].shape
    axis = split.attributes.get_int("axis", 0)
    if shape is None or axis not in (-1, len(shape) - 1) or any(value.is_graph_output() for value in split.outputs):
        return None
    if given is not None:
        tensor = given.const_value if given.const_value is not None else ir.convenience.get_const_tensor(given)
        return None if tensor is None else tensor.numpy().tolist()
    width = shape[-1]
    return [width // len(split.outputs)] * len(split.outputs) if isinstance(width, int) else None
