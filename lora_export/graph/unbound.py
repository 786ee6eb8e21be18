"""Initializers without a value: naming them, preparing them for fusion, and keeping a graph of them in a file.

An unbound initializer has `const_value` None and a `Recipe` in its metadata. Fusions that need a constant's value leave
it alone; all others work on it by name and shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as common_passes

from lora_export.base.recipe import RECIPE, Recipe


def recipe_of(value: ir.Value) -> Recipe | None:
    """The recipe of an unbound initializer, or None for any other value."""
    text = value.metadata_props.get(RECIPE)
    return Recipe.from_json(text) if text is not None and value.const_value is None else None


def unbound(graph: ir.Graph) -> Iterator[tuple[ir.Value, Recipe]]:
    """The unbound initializers of `graph` with their recipes, in the order of the graph."""
    for value in graph.initializers.values():
        if (recipe := recipe_of(value)) is not None:
            yield value, recipe


def set_recipe(value: ir.Value, recipe: Recipe) -> None:
    value.metadata_props[RECIPE] = recipe.to_json()


def prepare_weights(model: ir.Model) -> ir.Model:
    """Give every unbound initializer its recipe, and rewrite `Transpose(weight)` to a weight stored transposed.

    1. All uses of a 2-D weight are its Transpose: the initializer itself becomes `[in, out]`.
    2. Some are not (an embedding tied to a head): the Transpose stays, the weight is stored once;
       `fuse` turns it into a multiplication that reads the weight transposed.
    """
    graph = model.graph
    for value in list(graph.initializers.values()):
        if value.const_value is not None or value.is_graph_input():
            continue
        transposes = [node for node, _ in value.uses() if is_matrix_transpose(node)]
        all_transposed = bool(transposes) and len(transposes) == len(tuple(value.uses()))
        set_recipe(value, Recipe((value.name,), transposed=all_transposed))
        if not all_transposed:
            continue
        value.shape = ir.Shape([value.shape[1], value.shape[0]])
        for node in transposes:
            node.outputs[0].replace_all_uses_with(value)
            graph.remove(node, safe=True)
    return model


def is_matrix_transpose(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and list(node.attributes.get_ints("perm", [])) == [1, 0]


def save_weightless(model: ir.Model, path: Path) -> None:
    """Write `model` with its unbound initializers; ONNX has no such thing, so the file holds them as inputs."""
    graph = model.graph
    names = [value.name for value, _ in unbound(graph)]
    values = [graph.initializers.pop(name) for name in names]
    graph.inputs.extend(value for value in values if not value.is_graph_input())
    ir.save(model, path)
    _restore(graph)


def load_weightless(path: Path) -> ir.Model:
    """Read what `save_weightless` wrote.

    Raises:
        Exception: Whatever the ONNX parser raises on a damaged file; the cache treats that as a miss.
    """
    model = ir.load(path)
    if not len(model.graph):
        raise ValueError("the file holds no graph")  # an empty file is a valid protobuf
    _restore(model.graph)
    return model


def _restore(graph: ir.Graph) -> None:
    for value in list(graph.inputs):
        if RECIPE in value.metadata_props:
            if not value.shape.is_static():
                graph.initializers[value.name] = value  # an adapter input: both input and unbound default
                continue
            graph.inputs.remove(value)
            graph.initializers[value.name] = value


def bind_small(model: ir.Model, arrays: Mapping[str, np.ndarray]) -> ir.Model:
    """Give the unbound initializers named in `arrays` (norms, biases) their values, so that fusions can use them."""
    for name, array in arrays.items():
        value = model.graph.initializers.get(name)
        if value is not None and recipe_of(value) is not None:
            value.const_value = ir.tensor(array, dtype=value.dtype, name=name)
            del value.metadata_props[RECIPE]
    return model


def rename_weight(model: ir.Model, name: str, other_name: str) -> ir.Model:
    """Let a tied weight that goes by `name`, which an adapter changes elsewhere, be read by its `other_name`."""
    value = model.graph.initializers.get(name)
    if value is not None:
        model.graph.initializers.pop(name)
        value.name = other_name
        set_recipe(value, Recipe((other_name,)))
        model.graph.initializers[other_name] = value
    return model


def untie(model: ir.Model, module: str, sites: Iterable[ir.Node], *, other_name: str) -> ir.Model:
    """Give `module` its own weight where it shares one (a head tied to an embedding) that an adapter will change.

    Args:
        sites: The MatMul nodes of `module`, each reading the shared weight through a Transpose.
        other_name: The parameter path under which the other uses go on reading the shared weight.
    """
    graph = model.graph
    for node in sites:
        transpose = node.inputs[1].producer()
        shared = transpose.inputs[0]
        own = graph.initializers.get(f"{module}.weight")
        if own is None or own is shared:
            graph.initializers.pop(shared.name)
            shared.name = other_name
            set_recipe(shared, Recipe((other_name,)))
            graph.initializers[other_name] = shared
            own = ir.Value(name=f"{module}.weight", type=shared.type, shape=ir.Shape(list(shared.shape)))
            set_recipe(own, Recipe((own.name,)))
            graph.initializers[own.name] = own
        private = ir.node(
            "Transpose", [own], attributes={"perm": [1, 0]}, metadata_props=dict(transpose.metadata_props)
        )
        private.outputs[0].shape, private.outputs[0].type = transpose.outputs[0].shape, transpose.outputs[0].type
        graph.insert_before(node, private)
        node.replace_input_with(1, private.outputs[0])
    common_passes.RemoveUnusedNodesPass()(model)
    return model
