"""Copy a unit of a finished graph, so that tracing and fusing cost the same at any depth.

A graph of a stack's traced layers becomes one of all: of its four units (first layers, two periods, last layers) the
third is copied. A period is one layer, or as many as it takes until their kinds repeat. A node's
unit follows from what the node reads: it is the highest unit whose parameters or cache the node depends on. A fusion
may move a node over the border of two units. The node is then in the next unit, and so is its like in every unit.

The two middle units must be the same computation, node by node: equal operators and attributes, and operands that are

1. the same parameter, cache, adapter input or default of either unit, or of the one before each;
2. what the corresponding nodes of either unit, or of the one before each, give;
3. the same value for both, or equal ones of no unit: constants, or the same made of equal ones.

Where the two units differ, nothing is copied, and the whole model is traced.

A graph of several stacks is stamped stack by stack. To each of them, the layers of the others are in none of its units.

While the graph is fused, norms and biases have stand-ins for values, and no two stand-ins have the same numbers. So
what constant folding makes of them differs from layer to layer, and no two of its constants become one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as common_passes

from lora_export.base.layers import Stack
from lora_export.base.recipe import RECIPE, Recipe
from lora_export.graph.layer_names import COPIED, FIRST, FIRST_OF_TWO, LAST, UNITS, LayerNames, expanded

_COMMUTATIVE = ("Add", "Mul")


def holds(graph: ir.Graph, path: str) -> bool:
    """Whether `graph` reads parameters of the layers at `path`."""
    return any(name.startswith(f"{path}.") and any(value.uses()) for name, value in graph.initializers.items())


def stamp(model: ir.Model, stack: Stack, small: Mapping[str, np.ndarray]) -> ir.Model | None:
    """`model`, of `stack`'s traced layers, with all of them (changed in place and returned); None if its two middle
    units are not the same, and it is unchanged then.

    Args:
        small: The bound parameters of all layers, by path, which take the place of their stand-ins.
    """
    graph, names = model.graph, LayerNames(stack)
    units = _Units(graph, names, stack.period)
    if not units.are_a_chain() or not units.middle_is_alike(small):
        return None
    values = (graph.inputs, graph.outputs, graph.initializers.values())
    order = [expanded([v.name for v in each], names.unit, names.shifted, stack=stack) for each in values]
    copier = _Copier(graph, units, names)
    copier.shift_last(stack.copies[-1])
    for by in stack.copies:
        copier.copy(by)
    copier.connect_last(stack.copies[-1])
    inputs, outputs = ({value.name: value for value in each} for each in (graph.inputs, graph.outputs))
    graph.inputs[:], graph.outputs[:] = [inputs[name] for name in order[0]], [outputs[name] for name in order[1]]
    for name in order[2]:
        value = graph.initializers[name] = graph.initializers.pop(name)
        if names.layer(name) is not None and value.const_value is not None and name in small:
            value.const_value = ir.tensor(small[name], dtype=value.dtype, name=name)
    common_passes.TopologicalSortPass()(model)
    return model


class _Units:
    """The nodes of a graph by unit, each in the graph's order; `None` for those of none.

    Attributes:
        corresponding: The values of the first of the middle units, and what each is in the second.
    """

    def __init__(self, graph: ir.Graph, names: LayerNames, period: int) -> None:
        self._names, self._period = names, period
        self.of_value: dict[ir.Value, int | None] = {}
        self.nodes: dict[int | None, list[ir.Node]] = {unit: [] for unit in (None, *UNITS)}
        self._has_subgraphs = False
        for node in graph:
            self._has_subgraphs |= any(
                attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values()
            )
            found = [self.unit(value) for value in node.inputs if value is not None]
            # How large a batch or a cache is, is the same for all layers.
            of_none = node.op_type == "Shape" and node.inputs[0].producer() is None
            unit = None if of_none else max((each for each in found if each is not None), default=None)
            self.nodes[unit].append(node)
            self.of_value |= dict.fromkeys(node.outputs, unit)
        self.corresponding: dict[ir.Value, ir.Value] = {}

    def unit(self, value: ir.Value) -> int | None:
        if value.producer() is None and value not in self.of_value:
            self.of_value[value] = self._names.unit(value.name)
        return self.of_value.get(value)

    def are_a_chain(self) -> bool:
        """Whether every unit has nodes, and none reads of another than the one before, or the first."""
        if self._has_subgraphs or not all(self.nodes[unit] for unit in UNITS):
            return False
        for unit in UNITS[1:]:
            for node in self.nodes[unit]:
                read = [value for value in node.inputs if value is not None]
                far = [value for value in read if self.unit(value) not in (None, unit - 1, unit)]
                if any(self.unit(value) != FIRST or value.producer() is None for value in far):
                    return False
        return True

    def middle_is_alike(self, small: Collection[str]) -> bool:
        """Whether the two middle units are the same computation; `small` are the names of bound parameters."""
        one, other = self.nodes[FIRST_OF_TWO], self.nodes[COPIED]
        if len(one) != len(other):
            return False
        corresponding: dict[ir.Value, ir.Value] = {}
        for a, b in zip(one, other, strict=True):
            if not _is_same_operation(a, b):
                return False
            for x, y in zip(a.inputs, b.inputs, strict=True):
                if not self._is_same_operand(x, y, corresponding, small=small):
                    return False
            corresponding |= dict(zip(a.outputs, b.outputs, strict=True))
        self.corresponding = corresponding
        return True

    def _is_same_operand(
        self,
        x: ir.Value | None,
        y: ir.Value | None,
        corresponding: Mapping[ir.Value, ir.Value],
        *,
        small: Collection[str],
    ) -> bool:
        if x is None or y is None:
            return x is y
        if x in corresponding:
            return corresponding[x] is y
        if x is y:
            return self.unit(x) in (None, FIRST)
        at, other_at = self.unit(x), self.unit(y)
        if at is None and other_at is None:
            return self._is_same_of_none(x, y)
        if None in (at, other_at) or (at, other_at) not in ((FIRST_OF_TWO, COPIED), (FIRST, FIRST_OF_TWO)):
            return False
        if x.producer() is None and y.producer() is None:
            shape = self._names.shifted_shape(x.shape, self._period)
            same = shape == y.shape and x.dtype == y.dtype and x.is_graph_input() == y.is_graph_input()
            bound = x.const_value is not None and x.name not in small
            is_named = self._names.shifted(x.name, self._period) == y.name
            return same and is_named and (not bound or _is_same_constant(x, y))
        return x.producer() is not None and y.producer() is not None and at == FIRST

    def _is_same_of_none(self, x: ir.Value, y: ir.Value) -> bool:
        """Whether two values of no unit are equal: one, equal constants, or the same made of equal ones.

        How large the cache of one layer is, so is that of another.
        """
        if x is y or _is_same_constant(x, y):
            return True
        a, b = x.producer(), y.producer()
        if a is None or b is None or x.index() != y.index() or not _is_same_operation(a, b):
            return False
        if a.op_type == "Shape" and a.inputs[0].producer() is None and b.inputs[0].producer() is None:
            one, other = a.inputs[0], b.inputs[0]
            return one is other or self._names.shifted(one.name, self._period) == other.name
        orders = (b.inputs, reversed(b.inputs)) if a.op_type in _COMMUTATIVE else (b.inputs,)
        return any(all(map(self._are_same_of_none, a.inputs, order)) for order in orders)

    def _are_same_of_none(self, x: ir.Value | None, y: ir.Value | None) -> bool:
        return x is y or (x is not None and y is not None and self._is_same_of_none(x, y))


def _is_same_operation(a: ir.Node, b: ir.Node) -> bool:
    if (a.op_type, a.domain, a.overload) != (b.op_type, b.domain, b.overload):
        return False
    if len(a.inputs) != len(b.inputs) or len(a.outputs) != len(b.outputs) or a.attributes.keys() != b.attributes.keys():
        return False
    return all(_is_same_attribute(a.attributes[name].value, b.attributes[name].value) for name in a.attributes)


def _is_same_attribute(one: object, other: object) -> bool:
    if isinstance(one, ir.TensorProtocol):
        return isinstance(other, ir.TensorProtocol) and _are_same_tensors(one, other)
    return one == other


def _is_same_constant(x: ir.Value, y: ir.Value) -> bool:
    tensors = [ir.convenience.get_const_tensor(value) for value in (x, y)]
    return None not in tensors and _are_same_tensors(*tensors)


def _are_same_tensors(one: ir.TensorProtocol, other: ir.TensorProtocol) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


class _Copier:
    """Copies the second of a graph's middle units, one after the other.

    Attributes:
        images: What the values of that unit are in its last copy.
    """

    def __init__(self, graph: ir.Graph, units: _Units, names: LayerNames) -> None:
        self._graph, self._units, self._names = graph, units, names
        self.images = {value: value for node in units.nodes[COPIED] for value in node.outputs}
        self._last_node = units.nodes[COPIED][-1]
        leaves = [*graph.inputs, *graph.initializers.values()]
        self._leaves = {value.name: value for value in leaves if names.unit(value.name) not in (None, LAST)}

    def shift_last(self, by: int) -> None:
        """Let the traced last layers be those `by` above."""
        graph, names = self._graph, self._names
        for value in dict.fromkeys([*graph.inputs, *graph.outputs, *graph.initializers.values()]):
            if names.unit(value.name) != LAST:
                continue
            if value.is_initializer():
                del graph.initializers[value.name]
            old = ir.Value(name=value.name, type=value.type, const_value=value.const_value)
            old.metadata_props.update(value.metadata_props)
            value.name = names.shifted(value.name, by)
            self._leaves[value.name] = value
            value.shape = names.shifted_shape(value.shape, by)
            if self._fill(value, old, by):
                graph.initializers[value.name] = value
        for node in self._units.nodes[LAST]:
            node.metadata_props.update({key: names.shifted(text, by) for key, text in node.metadata_props.items()})

    def connect_last(self, by: int) -> None:
        """Let the last layers read what the last copy, `by` above, gives, and its parameters."""
        for node in self._units.nodes[LAST]:
            for index, value in enumerate(node.inputs):
                if value is not None and value in self.images:
                    node.replace_input_with(index, self.images[value])
                elif value is not None and value.producer() is None and self._units.unit(value) == COPIED:
                    node.replace_input_with(index, self._leaf(value, by))

    def copy(self, by: int) -> None:
        """The unit's nodes once more, of the layers `by` above, which read of the copy before."""
        copied: dict[ir.Value, ir.Value] = {}
        nodes = []
        for node in self._units.nodes[COPIED]:
            inputs = [None if value is None else self._operand(value, copied, by) for value in node.inputs]
            scopes = {key: self._names.shifted(text, by) for key, text in node.metadata_props.items()}
            copy = ir.Node(
                node.domain, node.op_type, inputs, list(node.attributes.values()), overload=node.overload,
                num_outputs=len(node.outputs), version=node.version, metadata_props=scopes,
            )  # fmt: skip
            for old, new in zip(node.outputs, copy.outputs, strict=True):
                new.shape, new.type = self._names.shifted_shape(old.shape, by), old.type
                if old.is_graph_output():
                    new.name = self._names.shifted(old.name, by)
                    self._graph.outputs.append(new)
            copied |= dict(zip(node.outputs, copy.outputs, strict=True))
            nodes.append(copy)
        self._graph.insert_after(self._last_node, nodes)
        self.images, self._last_node = copied, nodes[-1]

    def _operand(self, value: ir.Value, copied: Mapping[ir.Value, ir.Value], by: int) -> ir.Value:
        """What a copy reads in place of `value`."""
        if value in copied:
            return copied[value]
        if self._units.unit(value) not in (FIRST_OF_TWO, COPIED):
            return value
        if value.producer() is None:
            return self._leaf(value, by)
        return self.images[self._units.corresponding[value]]

    def _leaf(self, value: ir.Value, by: int) -> ir.Value:
        """The parameter or input that is `by` layers above what `value` is in its own; made at its first use."""
        name = self._names.shifted(value.name, by)
        if name not in self._leaves:
            new = ir.Value(name=name, type=value.type, shape=self._names.shifted_shape(value.shape, by))
            if value.is_graph_input():
                self._graph.inputs.append(new)
            if value.is_initializer() and self._fill(new, value, by):
                self._graph.initializers[name] = new
            self._leaves[name] = new
        return self._leaves[name]

    def _fill(self, new: ir.Value, old: ir.Value, by: int) -> bool:
        """Give `new`, `by` layers above, the recipe or the value that makes it what `old` is in its own; False for
        none."""
        if RECIPE in old.metadata_props:
            recipe = Recipe.from_json(old.metadata_props[RECIPE])
            parameters = tuple(self._names.shifted(parameter, by) for parameter in recipe.parameters)
            new.metadata_props[RECIPE] = replace(recipe, parameters=parameters).to_json()
            return True
        if old.const_value is None:
            return False
        # An input's default, the sizes of what is packed, or a stand-in, whose place the layer's own takes at the end.
        new.const_value = ir.tensor(old.const_value.numpy(), dtype=old.dtype, name=new.name)
        return True
