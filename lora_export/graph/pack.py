"""Projections of one input, packed: their weights side by side in one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.convenience import replace_nodes_and_values

from lora_export.base.recipe import Recipe
from lora_export.graph.unbound import recipe_of, set_recipe


def pack_siblings(model: ir.Model, may: Callable[[Recipe], bool] = lambda recipe: True) -> ir.Model:
    """Turn the MatMuls that read one input with unbound weights `[in, out_i]` into one MatMul and a Split.

    Query, key and value projections, or an MLP's gate and up: one launch on a GPU instead of three. On a CPU it does
    not pay for floats, as taking the parts apart again is a pass over memory: 1.06 to 1.17 × the time of three MatMuls
    (384 wide, 4 × 128 tokens, two cores). Of a decoder's integers it does: each product of its own rounds its input
    anew. The packed weight's recipe concatenates the others', so nothing is read here. The sum of `out_i` is the packed
    width.

    Args:
        may: Which weights may be packed, by their recipe.
    """
    graph = model.graph
    values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
    for value in values:
        products = [node for node, index in value.uses() if index == 0 and is_packable(node)]
        siblings = [node for node in products if may(recipe_of(node.inputs[1]))]
        if len(siblings) >= 2:
            _pack(graph, value, siblings)
    return model


def is_packable(node: ir.Node) -> bool:
    """Whether `node` is a MatMul by an unbound weight `[in, out]` that nothing else reads."""
    if node.op_type != "MatMul" or node.domain != "":
        return False
    weight = node.inputs[1]
    recipe = recipe_of(weight) if weight.is_initializer() and not weight.is_graph_input() else None
    return recipe is not None and len(weight.shape) == 2 and len(tuple(weight.uses())) == 1


def pack_weights(graph: ir.Graph, weights: list[ir.Value]) -> ir.Value | None:
    """One unbound weight `[in, Σ out_i]` in place of `weights`, each `[in, out_i]`, whose readers are to be replaced;
    None if they are stored in different ways."""
    recipes = [recipe_of(weight) for weight in weights]
    if len({(recipe.transposed, weight.shape[0]) for recipe, weight in zip(recipes, weights, strict=True)}) != 1:
        return None
    packed = ir.Value(
        name="+".join(weight.name for weight in weights),
        type=ir.TensorType(weights[0].dtype),
        shape=ir.Shape([weights[0].shape[0], sum(weight.shape[1] for weight in weights)]),
    )
    set_recipe(packed, Recipe(tuple(p for recipe in recipes for p in recipe.parameters), recipes[0].transposed, 1))
    graph.initializers[packed.name] = packed
    return packed


def _pack(graph: ir.Graph, value: ir.Value, siblings: list[ir.Node]) -> None:
    weights = [node.inputs[1] for node in siblings]
    packed = pack_weights(graph, weights)
    if packed is None:
        return
    sizes = [weight.shape[1] for weight in weights]
    split_sizes = ir.Value(
        name=f"{packed.name}.sizes", const_value=ir.tensor(np.array(sizes, np.int64)), shape=ir.Shape([len(sizes)])
    )
    split_sizes.dtype = ir.DataType.INT64
    graph.register_initializer(split_sizes)
    matmul = ir.node("MatMul", [value, packed])
    split = ir.node("Split", [matmul.outputs[0], split_sizes], attributes={"axis": -1}, num_outputs=len(siblings))
    matmul.outputs[0].dtype = weights[0].dtype
    if value.shape is not None:
        matmul.outputs[0].shape = ir.Shape([*value.shape[:-1], sum(sizes)])
    order = {id(node): position for position, node in enumerate(graph)}
    first = min(siblings, key=lambda node: order[id(node)])
    outputs = [node.outputs[0] for node in siblings]
    replace_nodes_and_values(graph, first, siblings, [matmul, split], outputs, split.outputs)
    for weight in weights:
        del graph.initializers[weight.name]
