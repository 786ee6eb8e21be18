"""Name by the base's paths what of a given graph was matched, as a trace of the base names it.

An initializer becomes `<module>.weight` or `<module>.bias`, and its node gets the module's scope. Floats lose their
values: the base's are written in their place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from lora_export.base.recipe import Recipe
from lora_export.graph.matching import PARTS, GivenWeight
from lora_export.graph.sites import NAME_SCOPES, bias_inside
from lora_export.graph.unbound import set_recipe


def name_weights(graph: ir.Graph, weights: Sequence[GivenWeight]) -> None:
    """Name the matched of `weights` by the base's paths, in `graph` (changed in place); floats become unbound."""
    for weight in weights:
        if not weight.modules:
            continue
        paths = tuple(f"{each.module}.weight" for each in weight.modules)
        name = "+".join(paths)
        if weight.is_integers:  # a table of them is known by its node
            bits = weight.node.attributes.get_int("bits", 4)
            for place, suffix in () if weight.is_table else PARTS.items():
                part = weight.node.inputs[place] if place < len(weight.node.inputs) else None
                if part is not None and part.is_initializer():
                    rename(graph, part, name + suffix.format(bits=bits))
        else:
            rename(graph, weight.value, name)
            # A recipe says whether a parameter is stored the other way round than the base has it.
            transposed = weight.modules[0].is_in_out == weight.is_out_in
            set_recipe(weight.value, Recipe(paths, transposed, axis=0 if weight.is_out_in else 1))
            weight.value.const_value = None
        if len(weight.modules) == 1:
            for node in weight.nodes:
                # The path of the module that it computes, as the exporter records it.
                scopes = ["", weight.modules[0].module, node.name or node.op_type]
                node.metadata_props[NAME_SCOPES] = repr(scopes)


def rename(graph: ir.Graph, value: ir.Value, name: str) -> None:
    """Name an initializer of `graph`, unless something else has that name or a host knows it by its own."""
    taken = name in graph.initializers or any(each.name == name for each in (*graph.inputs, *graph.outputs))
    if name == value.name or taken or value.is_graph_output():
        return  # a second copy of the same numbers keeps its name
    graph.initializers.pop(value.name)
    value.name = name
    graph.initializers[name] = value


def name_biases(graph: ir.Graph, weights: Sequence[GivenWeight], biases: Mapping[str, np.ndarray]) -> frozenset[str]:
    """Name the base's `biases` (by module) where they are added to the products of `weights`, in `graph` (changed in
    place); they become unbound. The modules whose bias was found.
    """
    found = set()
    for weight in weights:
        module = weight.modules[0].module if len(weight.modules) == 1 else None
        if module not in biases:
            continue
        adders = {user for node in weight.nodes for user, _ in node.outputs[0].uses() if user.op_type == "Add"}
        for value in _added_to(weight.node):
            if not {user for user, _ in value.uses()} <= adders.union(weight.nodes):
                continue  # other modules with equal numbers add it, too
            array = value.const_value.numpy() if value.const_value is not None else None
            if array is not None and np.array_equal(array, biases[module].astype(array.dtype)):
                rename(graph, value, f"{module}.bias")
                set_recipe(value, Recipe((f"{module}.bias",)))
                value.const_value = None
                found.add(module)
                break
    return frozenset(found)


def _added_to(node: ir.Node) -> Iterator[ir.Value]:
    """The initializers that may be the bias of the product `node`."""
    if (bias := bias_inside(node)) is not None:
        yield bias
    for user, _ in node.outputs[0].uses():
        if user.op_type == "Add":
            yield from (value for value in user.inputs if value is not None and value.is_initializer())
