"""Attention without a cache, on the CPU: one operator, a mask of keys, heads in one axis.

`Attention(q, k, v, mask)`, as it is traced, reads q, k and v by head and a number to add for each query and key.

1. A mask that lets each key through for all queries or for none (`key_mask.py`) becomes a boolean one, computed once;
   one that lets all through is dropped.
2. Where q, k and v were just split into heads, that is taken back, and the operator splits them itself. With rotary
   embeddings this step does not apply.
3. Where they are then plain projections of one input, they become ONNX Runtime's packed `Attention`, which holds the
   three weights as one: the form of ONNX Runtime's own optimizer. A projection with an adapter's pair is not plain.

MiniLM on two cores, beside the optimizer's graph: 0.99 to 1.03 packed, 1.00 to 1.05 with the standard operator,
1.04 to 1.07 with `MultiHeadAttention`, 1.07 to 1.11 in parts.

A row without any token attends its padding, where PyTorch gives zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as common_passes

from lora_export.graph.attention_node import attended, is_plain
from lora_export.graph.heads import before_heads, read_instead
from lora_export.graph.key_mask import KeyMask, is_false_with_keys, key_mask
from lora_export.graph.pack import is_packable, pack_weights

_BOOL, _INT32, _INT64 = ir.DataType.BOOL, ir.DataType.INT32, ir.DataType.INT64
# What the packed operator adds to a masked score: its default of -10,000 is not low enough for every model.
_MASKED = float(np.finfo(np.float32).min)


def simplify_attention(model: ir.Model) -> ir.Model:
    """Rewrite `model`, fused for the CPU (changed in place and returned), where the conditions hold."""
    masks = _Masks(model.graph)
    for node in [each for each in model.graph if (each.op_type, each.domain) == ("Attention", "")]:
        if len(node.inputs) <= 4 and len(node.outputs) == 1 and is_plain(node):
            _simplify(model.graph, node, masks)
    model.graph.opset_imports.setdefault("com.microsoft", 1)
    common_passes.RemoveUnusedNodesPass()(model)
    common_passes.TopologicalSortPass()(model)
    return model


@dataclass(frozen=True)
class _Projection:
    """A plain linear map: the product by a weight of its own, and the bias where it has one."""

    product: ir.Node
    bias: ir.Value | None


class _Masks:
    """What the masks of a graph let through, and the nodes that say so in another form, made once for each."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self.keys = cache(partial(key_mask, graph))
        self.is_of_empty_rows = cache(partial(is_false_with_keys, graph))
        self._made: dict[object, ir.Value] = {}

    def as_int32(self, given: ir.Value) -> ir.Value:
        """`[batch, keys]`: not 0 where a key is attended."""
        if given not in self._made:
            self._made[given] = self._op("Cast", [given], _INT32, list(given.shape), to=_INT32)
        return self._made[given]

    def as_boolean(self, given: ir.Value, of: ir.Value, query: ir.Value) -> ir.Value:
        """`[batch, 1, queries, keys]`, in place of the mask `of`, which the attention of `query`, `[batch, heads,
        queries, size]`, reads."""
        if of not in self._made:
            batch, keys = given.shape
            attended = self._op("Cast", [given], _BOOL, [batch, keys], to=_BOOL)
            attended = self._op("Unsqueeze", [attended, self._ints(1, 2)], _BOOL, [batch, 1, 1, keys])
            n_queries = self._size(query, 2)
            ones = self._ints(1, 1)
            shape = self._op("Concat", [ones, n_queries, self._ints(1)], _INT64, [4], axis=0)
            self._made[of] = self._op("Expand", [attended, shape], _BOOL, [batch, 1, query.shape[2], keys])
        return self._made[of]

    def _size(self, value: ir.Value, axis: int) -> ir.Value:
        """`[1]`: the size of an axis, read from a graph input where one has it, so that no layer depends on another."""
        dim = value.shape[axis]
        is_named = not isinstance(dim, int) and dim.value is not None
        source = next((each for each in self._graph.inputs if is_named and dim in tuple(each.shape)), None)
        if source is not None:
            value, axis = source, tuple(source.shape).index(dim)
        return self._op("Shape", [value], _INT64, [1], start=axis, end=axis + 1)

    def _ints(self, *values: int) -> ir.Value:
        return self._op("Constant", [], _INT64, [len(values)], value=ir.tensor(np.array(values, np.int64)))

    def _op(self, op_type: str, inputs: list[ir.Value], dtype: ir.DataType, shape: list, **attributes) -> ir.Value:
        node = ir.node(op_type, inputs, attributes=attributes)
        node.outputs[0].dtype, node.outputs[0].shape = dtype, ir.Shape(shape)
        self._graph.append(node)
        return node.outputs[0]


def _simplify(graph: ir.Graph, node: ir.Node, masks: _Masks) -> None:
    traced_mask = node.inputs[3] if len(node.inputs) > 3 else None
    of_keys = masks.keys(traced_mask)
    merged = [before_heads(states) for states in node.inputs[:3]]
    if of_keys is None:
        if None not in merged:
            _attend(graph, node, merged, traced_mask, node.outputs[0])
        return
    result = attended(node, masks.is_of_empty_rows)
    packed = None if None in merged else _packed(graph, node, merged, of_keys, masks)
    if packed is not None:
        read_instead(result, packed)
        return
    mask = None if of_keys.given is None else masks.as_boolean(of_keys.given, traced_mask, node.inputs[0])
    _attend(graph, node, merged, mask, result)


def _attend(
    graph: ir.Graph, node: ir.Node, before: list[ir.Value | None], mask: ir.Value | None, old: ir.Value
) -> None:
    """The standard operator in place of `node`, its heads in one axis where they were so before."""
    query, value = node.inputs[0], node.inputs[2]
    attributes = {"scale": _scale(node)}
    states = node.inputs[:3]
    if None not in before:
        states = before
        attributes |= {"q_num_heads": query.shape[1], "kv_num_heads": value.shape[1]}
    simpler = ir.node(
        "Attention",
        [*states, mask] if mask is not None else list(states),
        attributes=attributes,
        metadata_props=dict(node.metadata_props),
    )
    result = simpler.outputs[0]
    result.dtype = query.dtype
    graph.insert_before(node, simpler)
    if None in before:
        result.shape = ir.Shape([*query.shape[:3], value.shape[3]])
        old.replace_all_uses_with(result)
    else:
        result.shape = ir.Shape([query.shape[0], query.shape[2], query.shape[1] * value.shape[3]])
        read_instead(old, result)


def _scale(node: ir.Node) -> float:
    return node.attributes.get_float("scale", node.inputs[0].shape[3] ** -0.5)


def _packed(graph: ir.Graph, node: ir.Node, states: list[ir.Value], mask: KeyMask, masks: _Masks) -> ir.Value | None:
    """`[batch, queries, heads·size]`: the packed operator's result; None where it cannot stand in for `node`."""
    heads = {value.shape[1] for value in node.inputs[:3]}
    projections = [_projection(value) for value in states]
    if len(heads) != 1 or None in projections or any(value.dtype != ir.DataType.FLOAT for value in states):
        return None
    products = [each.product for each in projections]
    if len({product.inputs[0] for product in products}) != 1 or len(set(products)) != 3:
        return None
    weight = pack_weights(graph, [product.inputs[1] for product in products])
    if weight is None:
        return None
    sizes = [value.shape[2] for value in states]
    nodes = _bias(projections, sizes, node)
    attributes = {"num_heads": heads.pop(), "qkv_hidden_sizes": sizes, "scale": _scale(node)}
    operands = [products[0].inputs[0], weight, nodes[-1].outputs[0]]
    if mask.given is not None:
        operands.append(masks.as_int32(mask.given))
        attributes["mask_filter_value"] = _MASKED
    packed = ir.node(
        "Attention", operands, attributes=attributes, domain="com.microsoft", metadata_props=dict(node.metadata_props)
    )
    result = packed.outputs[0]
    result.dtype, result.shape = states[0].dtype, ir.Shape([*states[0].shape[:2], sizes[2]])
    graph.insert_before(node, [*nodes, packed])
    return result


def _bias(projections: list[_Projection], sizes: list[int], node: ir.Node) -> list[ir.Node]:
    """Nodes of the module that `node` is of; the last gives the biases in a row, zeros for a projection without one.
    ONNX Runtime folds them when it loads the graph."""
    nodes, biases = [], []
    for projection, size in zip(projections, sizes, strict=True):
        if projection.bias is None:
            zeros = ir.tensor(np.zeros(size, np.float32))
            nodes.append(ir.node("Constant", [], attributes={"value": zeros}))
            nodes[-1].outputs[0].dtype, nodes[-1].outputs[0].shape = ir.DataType.FLOAT, ir.Shape([size])
        biases.append(projection.bias or nodes[-1].outputs[0])
    nodes.append(ir.node("Concat", biases, attributes={"axis": 0}))
    nodes[-1].outputs[0].dtype, nodes[-1].outputs[0].shape = ir.DataType.FLOAT, ir.Shape([sum(sizes)])
    for each in nodes:
        each.metadata_props.update(node.metadata_props)
    return nodes


def _projection(states: ir.Value) -> _Projection | None:
    """What `states`, `[batch, sequence, out]`, is, if nothing but this attention reads it."""
    node = states.producer()
    if node is None or len(tuple(states.uses())) != 1:
        return None
    if is_packable(node):
        return _Projection(node, None)
    if node.op_type != "Add" or len(node.inputs) != 2:
        return None
    for product, bias in (node.inputs, node.inputs[::-1]):
        is_bias = bias.is_initializer() and not bias.is_graph_input() and list(bias.shape) == [states.shape[2]]
        if is_bias and len(tuple(product.uses())) == 1 and product.producer() and is_packable(product.producer()):
            return _Projection(product.producer(), bias)
    return None
