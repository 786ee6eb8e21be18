"""Copy a layer of a finished graph, so that tracing and fusing cost the same at any depth.

A graph of `N_TRACED` layers becomes one of `n_layers`: the last but one is copied, the last becomes the last. Which
nodes are a layer's is told by what they read: a node is in layer `d` if `d` is the highest layer whose parameters or
cache it depends on. What fusions moved over a border is then in the next layer, in every layer alike.

The two middle layers must be the same computation, node by node: equal operators and attributes, and operands that are

1. the same parameter, cache, adapter input or default of either layer, or of the one before each;
2. what the corresponding nodes of either layer, or of the one before each, give;
3. the same value for both, or equal constants.

Where they are not, there is no copy to make, and the whole model is traced. While the graph is fused, norms and biases
are bound to stand-ins, each to other numbers: what is computed of them when constants are folded differs by layer then.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as common_passes

from lora_export.base.layers import N_TRACED, Stack
from lora_export.base.recipe import RECIPE, Recipe
from lora_export.graph.layer_names import COPIED, FIRST_OF_TWO, LAST, LayerNames, expanded


def stamp(model: ir.Model, stack: Stack, small: Mapping[str, np.ndarray]) -> ir.Model | None:
    """`model`, of `N_TRACED` layers, with all of `stack`'s (changed in place and returned); None if its two middle
    layers are not the same, and it is unchanged then.

    Args:
        small: The bound parameters of all layers, by path, which take the place of their stand-ins.
    """
    graph, names = model.graph, LayerNames(stack)
    layers = _Layers(graph, names)
    if not layers.is_a_chain() or not layers.middle_is_alike(small):
        return None
    values = (graph.inputs, graph.outputs, graph.initializers.values())
    order = [expanded([v.name for v in each], names.layer, names.moved, n_layers=stack.n_layers) for each in values]
    copier = _Copier(graph, layers, names)
    copier.rename_last(stack.n_layers - 1)
    for layer in range(COPIED + 1, stack.n_layers - 1):
        copier.copy(layer)
    copier.connect_last(stack.n_layers - 1)
    inputs, outputs = ({value.name: value for value in each} for each in (graph.inputs, graph.outputs))
    graph.inputs[:], graph.outputs[:] = [inputs[name] for name in order[0]], [outputs[name] for name in order[1]]
    for name in order[2]:
        value = graph.initializers[name] = graph.initializers.pop(name)
        if names.layer(name) is not None and value.const_value is not None and name in small:
            value.const_value = ir.tensor(small[name], dtype=value.dtype, name=name)
    common_passes.TopologicalSortPass()(model)
    return model


class _Layers:
    """The nodes of a graph by layer, each in the graph's order; `None` for those of no layer.

    Attributes:
        corresponding: The values of the first of the middle layers, and what each is in the second.
    """

    def __init__(self, graph: ir.Graph, names: LayerNames) -> None:
        self._graph, self._names = graph, names
        self.of_value: dict[ir.Value, int | None] = {}
        self.nodes: dict[int | None, list[ir.Node]] = {layer: [] for layer in (None, *range(N_TRACED))}
        self._has_subgraphs = False
        for node in graph:
            self._has_subgraphs |= any(
                attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values()
            )
            found = [self.layer(value) for value in node.inputs if value is not None]
            # How large a batch or a cache is, is the same for all layers.
            of_none = node.op_type == "Shape" and node.inputs[0].producer() is None
            layer = None if of_none else max((each for each in found if each is not None), default=None)
            self.nodes.setdefault(layer, []).append(node)
            self.of_value |= dict.fromkeys(node.outputs, layer)
        self.corresponding: dict[ir.Value, ir.Value] = {}

    def layer(self, value: ir.Value) -> int | None:
        if value.producer() is None and value not in self.of_value:
            self.of_value[value] = self._names.layer(value.name)
        return self.of_value.get(value)

    def is_a_chain(self) -> bool:
        """Whether there are `N_TRACED` layers, and none reads of another than the one before, or the first."""
        if (
            self._has_subgraphs
            or set(self.nodes) != {None, *range(N_TRACED)}
            or not all(self.nodes[d] for d in range(N_TRACED))
        ):
            return False
        for layer in range(1, N_TRACED):
            for node in self.nodes[layer]:
                read = [value for value in node.inputs if value is not None]
                far = [value for value in read if self.layer(value) not in (None, layer - 1, layer)]
                if any(self.layer(value) != 0 or value.producer() is None for value in far):
                    return False
        return True

    def middle_is_alike(self, small: Collection[str]) -> bool:
        """Whether the two middle layers are the same computation; `small` are the names of bound parameters."""
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
            return self.layer(x) in (None, 0)
        at, other_at = self.layer(x), self.layer(y)
        if at is None and other_at is None:
            return _is_same_constant(x, y)
        if None in (at, other_at) or (at, other_at) not in ((FIRST_OF_TWO, COPIED), (FIRST_OF_TWO - 1, FIRST_OF_TWO)):
            return False
        if x.producer() is None and y.producer() is None:
            shape = self._names.moved_shape(x.shape, other_at)
            same = shape == y.shape and x.dtype == y.dtype and x.is_graph_input() == y.is_graph_input()
            bound = x.const_value is not None and x.name not in small
            return same and self._names.moved(x.name, other_at) == y.name and (not bound or _is_same_constant(x, y))
        return x.producer() is not None and y.producer() is not None and at == FIRST_OF_TWO - 1


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
    """Copies the last but one of a graph's layers, one after the other.

    Attributes:
        images: What the last but one layer's values are in the layer that was copied last.
    """

    def __init__(self, graph: ir.Graph, layers: _Layers, names: LayerNames) -> None:
        self._graph, self._layers, self._names = graph, layers, names
        self.images = {value: value for node in layers.nodes[COPIED] for value in node.outputs}
        self._last_node = layers.nodes[COPIED][-1]
        leaves = [*graph.inputs, *graph.initializers.values()]
        self._leaves = {value.name: value for value in leaves if names.layer(value.name) not in (None, LAST)}

    def rename_last(self, layer: int) -> None:
        """Let the traced last layer be layer `layer`."""
        graph, names = self._graph, self._names
        for value in dict.fromkeys([*graph.inputs, *graph.outputs, *graph.initializers.values()]):
            if names.layer(value.name) != LAST:
                continue
            if value.is_initializer():
                del graph.initializers[value.name]
            old = ir.Value(name=value.name, type=value.type, const_value=value.const_value)
            old.metadata_props.update(value.metadata_props)
            value.name = names.moved(value.name, layer)
            self._leaves[value.name] = value
            value.shape = self._names.moved_shape(value.shape, layer)
            if self._fill(value, old, layer):
                graph.initializers[value.name] = value
        for node in self._layers.nodes[LAST]:
            node.metadata_props.update({key: names.moved(text, layer) for key, text in node.metadata_props.items()})

    def connect_last(self, layer: int) -> None:
        """Let the last layer, `layer`, read what the copy before it gives, and that copy's parameters."""
        for node in self._layers.nodes[LAST]:
            for index, value in enumerate(node.inputs):
                if value is not None and value in self.images:
                    node.replace_input_with(index, self.images[value])
                elif value is not None and value.producer() is None and self._layers.layer(value) == COPIED:
                    node.replace_input_with(index, self._leaf(value, layer - 1))

    def copy(self, layer: int) -> None:
        """The last but one layer's nodes once more, as layer `layer`, which reads of the copy before it."""
        copied: dict[ir.Value, ir.Value] = {}
        nodes = []
        for node in self._layers.nodes[COPIED]:
            inputs = [None if value is None else self._operand(value, copied, layer) for value in node.inputs]
            scopes = {key: self._names.moved(text, layer) for key, text in node.metadata_props.items()}
            copy = ir.Node(
                node.domain, node.op_type, inputs, list(node.attributes.values()), overload=node.overload,
                num_outputs=len(node.outputs), version=node.version, metadata_props=scopes,
            )  # fmt: skip
            for old, new in zip(node.outputs, copy.outputs, strict=True):
                new.shape, new.type = self._names.moved_shape(old.shape, layer), old.type
                if old.is_graph_output():
                    new.name = self._names.moved(old.name, layer)
                    self._graph.outputs.append(new)
            copied |= dict(zip(node.outputs, copy.outputs, strict=True))
            nodes.append(copy)
        self._graph.insert_after(self._last_node, nodes)
        self.images, self._last_node = copied, nodes[-1]

    def _operand(self, value: ir.Value, copied: Mapping[ir.Value, ir.Value], layer: int) -> ir.Value:
        """What a copy reads in place of `value`."""
        if value in copied:
            return copied[value]
        of = self._layers.layer(value)
        if of not in (FIRST_OF_TWO, COPIED):
            return value
        if value.producer() is None:
            return self._leaf(value, layer - (COPIED - of))
        return self.images[self._layers.corresponding[value]]

    def _leaf(self, value: ir.Value, layer: int) -> ir.Value:
        """The parameter or input of `layer` that is there what `value` is in its own; made at its first use."""
        name = self._names.moved(value.name, layer)
        if name not in self._leaves:
            new = ir.Value(name=name, type=value.type, shape=self._names.moved_shape(value.shape, layer))
            if value.is_graph_input():
                self._graph.inputs.append(new)
            if value.is_initializer() and self._fill(new, value, layer):
                self._graph.initializers[name] = new
            self._leaves[name] = new
        return self._leaves[name]

    def _fill(self, new: ir.Value, old: ir.Value, layer: int) -> bool:
        """Give `new` of `layer` the recipe or the value that makes it what `old` is in its own; False for none."""
        if RECIPE in old.metadata_props:
            recipe = Recipe.from_json(old.metadata_props[RECIPE])
            parameters = tuple(self._names.moved(parameter, layer) for parameter in recipe.parameters)
            new.metadata_props[RECIPE] = replace(recipe, parameters=parameters).to_json()
            return True
        if old.const_value is None:
            return False
        # An input's default, the sizes of what is packed, or a stand-in, whose place the layer's own takes at the end.
        new.const_value = ir.tensor(old.const_value.numpy(), dtype=old.dtype, name=new.name)
        return True
