"""Attention without a cache: one operator, a mask of keys, heads in one axis.

`Attention(q, k, v, mask)`, as it is traced, reads q, k and v by head. Its mask has a number for each query and key,
which is added to their score.

1. A mask that lets each key through for all queries or for none (`key_mask.py`) becomes a boolean one, computed once. A
   mask that lets every key through is dropped.
2. Where q, k and v were just split into heads, the split is removed, and the operator splits them itself. This step
   does not apply with rotary embeddings, which turn the heads after the split.
3. Where they are then plain projections of one input, they become ONNX Runtime's packed `Attention`, which holds the
   three weights as one: the form of ONNX Runtime's own optimizer. A projection with an adapter's pair is not plain.

MiniLM on two cores, beside the optimizer's graph: 0.99 to 1.03 packed, 1.00 to 1.05 with the standard operator,
1.04 to 1.07 with `MultiHeadAttention`, 1.07 to 1.11 in parts.

On CUDA step 2 ends in `MultiHeadAttention`. It adds the mask as numbers, which are made once for all layers; without a
mask it is flash attention. Step 3 is taken on CUDA only where no key is masked. For 16 × 512 tokens of MiniLM in
float16 on an H200, the packed operator with its own mask took twice the time of `MultiHeadAttention` with numbers.

A row without any token attends its padding, where PyTorch gives zeros.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache, partial

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as common_passes

from lora_export.graph.attention_node import attended, is_plain
from lora_export.graph.heads import before_heads, read_instead
from lora_export.graph.key_mask import KeyMask, is_false_with_keys, key_mask
from lora_export.graph.pack import is_packable, pack_weights
from lora_export.graph.tape import Tape

_FLOAT, _BOOL, _INT32, _INT64 = ir.DataType.FLOAT, ir.DataType.BOOL, ir.DataType.INT32, ir.DataType.INT64
# The dtypes of the packed operator.
_PACKED_ON_CPU, _PACKED_ON_CUDA = (_FLOAT,), (_FLOAT, ir.DataType.FLOAT16)
# What the packed operator adds to a masked score: its default of -10,000 is not low enough for every model.
_MASKED = float(np.finfo(np.float32).min)


def simplify_attention(model: ir.Model, provider: str = "cpu", *, holds_weights: bool = True) -> ir.Model:
    """Rewrite `model`, fused for `provider` (changed in place and returned), where the conditions hold.

    Args:
        holds_weights: Whether step 3 is taken; a weight that the operator holds cannot be quantized.
    """
    masks = _Masks(model.graph)
    simplify = _simplify if provider == "cpu" else _simplify_for_cuda
    for node in [each for each in model.graph if (each.op_type, each.domain) == ("Attention", "")]:
        if len(node.inputs) <= 4 and len(node.outputs) == 1 and is_plain(node):
            simplify(model.graph, node, masks, holds_weights=holds_weights)
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
        self._graph, self._tape = graph, Tape(graph, None)
        self.keys = cache(partial(key_mask, graph))
        self.is_of_empty_rows = cache(partial(is_false_with_keys, graph))
        self.as_int32 = cache(self._as_int32)
        self._boolean: dict[ir.Value, ir.Value] = {}
        self._numbers: dict[ir.Value, ir.Value] = {}

    def _as_int32(self, given: ir.Value) -> ir.Value:
        """`[batch, keys]`: not 0 where a key is attended."""
        return self._tape.op("Cast", [given], list(given.shape), _INT32, to=_INT32)

    def as_boolean(self, given: ir.Value, of: ir.Value, query: ir.Value) -> ir.Value:
        """`[batch, 1, queries, keys]`, in place of the mask `of`, which the attention of `query`, `[batch, heads,
        queries, size]`, reads."""
        if of not in self._boolean:
            tape, (batch, keys) = self._tape, given.shape
            attended = tape.op("Cast", [given], [batch, keys], _BOOL, to=_BOOL)
            attended = tape.op("Unsqueeze", [attended, tape.ints([1, 2])], [batch, 1, 1, keys], _BOOL)
            n_queries = self._size(query, 2)
            shape = tape.op("Concat", [tape.ints([1, 1]), n_queries, tape.ints([1])], [4], _INT64, axis=0)
            self._boolean[of] = tape.op("Expand", [attended, shape], [batch, 1, query.shape[2], keys], _BOOL)
        return self._boolean[of]

    def as_numbers(self, mask: ir.Value, dtype: ir.DataType) -> ir.Value:
        """`[batch, 1, queries, keys]`: what is added to a score, for a boolean `mask` of that shape."""
        if mask not in self._numbers:
            tape, lowest = self._tape, ml_dtypes.finfo(dtype.numpy()).min
            zero, low = (tape.constant(np.array(number, dtype.numpy())) for number in (0, lowest))
            self._numbers[mask] = tape.op("Where", [mask, zero, low], list(mask.shape), dtype)
        return self._numbers[mask]

    def _size(self, value: ir.Value, axis: int) -> ir.Value:
        """`[1]`: the size of an axis, read from a graph input where one has it, so that no layer depends on another."""
        dim = value.shape[axis]
        is_named = not isinstance(dim, int) and dim.value is not None
        source = next((each for each in self._graph.inputs if is_named and dim in tuple(each.shape)), None)
        if source is not None:
            value, axis = source, tuple(source.shape).index(dim)
        return self._tape.op("Shape", [value], [1], _INT64, start=axis, end=axis + 1)


def _simplify(graph: ir.Graph, node: ir.Node, masks: _Masks, *, holds_weights: bool) -> None:
    traced_mask = node.inputs[3] if len(node.inputs) > 3 else None
    of_keys = masks.keys(traced_mask)
    merged = [before_heads(states) for states in node.inputs[:3]]
    if of_keys is None:
        if None not in merged:
            _attend(graph, node, merged, mask=traced_mask, result=node.outputs[0])
        return
    result = attended(node, masks.is_of_empty_rows)
    packed = None if None in merged or not holds_weights else _packed(graph, node, merged, mask=of_keys, masks=masks)
    if packed is not None:
        read_instead(result, packed)
        return
    mask = None if of_keys.given is None else masks.as_boolean(of_keys.given, traced_mask, node.inputs[0])
    _attend(graph, node, merged, mask=mask, result=result)


def _simplify_for_cuda(graph: ir.Graph, node: ir.Node, masks: _Masks, *, holds_weights: bool) -> None:
    traced_mask = node.inputs[3] if len(node.inputs) > 3 else None
    of_keys = masks.keys(traced_mask)
    merged = [before_heads(states) for states in node.inputs[:3]]
    query, value, heads = node.inputs[0], node.inputs[2], {states.shape[1] for states in node.inputs[:3]}
    is_bias = traced_mask is None or (len(traced_mask.shape or ()) == 4 and traced_mask.dtype in (_BOOL, query.dtype))
    if None in merged or len(heads) != 1 or (of_keys is None and not is_bias):
        _simplify(graph, node, masks, holds_weights=False)
        return
    mask, result = traced_mask, node.outputs[0]
    if of_keys is not None:
        result = attended(node, masks.is_of_empty_rows)
        mask = None if of_keys.given is None else masks.as_boolean(of_keys.given, traced_mask, query)
    if mask is None and holds_weights:
        packed = _packed(graph, node, merged, mask=KeyMask(None), masks=masks, dtypes=_PACKED_ON_CUDA)
        if packed is not None:
            read_instead(result, packed)
            return
    if mask is not None and mask.dtype == _BOOL:
        mask = masks.as_numbers(mask, query.dtype)
    operands = merged if mask is None else [*merged, None, None, mask]
    shape = [query.shape[0], query.shape[2], query.shape[1] * value.shape[3]]
    options = {"domain": "com.microsoft", "num_heads": heads.pop(), "scale": _scale(node)}
    read_instead(result, Tape(graph, node).op("MultiHeadAttention", operands, shape, query.dtype, **options))


def _attend(
    graph: ir.Graph, node: ir.Node, merged: list[ir.Value | None], *, mask: ir.Value | None, result: ir.Value
) -> None:
    """The standard operator in place of `node`, whose `result` is read, its heads in one axis where they were merged
    before."""
    query, value, tape = node.inputs[0], node.inputs[2], Tape(graph, node)
    masks = [] if mask is None else [mask]
    if None in merged:
        shape = [*query.shape[:3], value.shape[3]]
        simpler = tape.op("Attention", [*node.inputs[:3], *masks], shape, query.dtype, scale=_scale(node))
        result.replace_all_uses_with(simpler)
        return
    heads = {"q_num_heads": query.shape[1], "kv_num_heads": value.shape[1]}
    shape = [query.shape[0], query.shape[2], query.shape[1] * value.shape[3]]
    simpler = tape.op("Attention", [*merged, *masks], shape, query.dtype, scale=_scale(node), **heads)
    read_instead(result, simpler)


def _scale(node: ir.Node) -> float:
    return node.attributes.get_float("scale", node.inputs[0].shape[3] ** -0.5)


def _packed(
    graph: ir.Graph,
    node: ir.Node,
    states: list[ir.Value],
    *,
    mask: KeyMask,
    masks: _Masks,
    dtypes: Collection[ir.DataType] = _PACKED_ON_CPU,
) -> ir.Value | None:
    """`[batch, queries, heads·size]`: the packed operator's result; None where it cannot stand in for `node`."""
    heads = {value.shape[1] for value in node.inputs[:3]}
    projections = [_projection(value) for value in states]
    if len(heads) != 1 or None in projections or any(value.dtype not in dtypes for value in states):
        return None
    products = [each.product for each in projections]
    if len({product.inputs[0] for product in products}) != 1 or len(set(products)) != 3:
        return None
    weight = pack_weights(graph, [product.inputs[1] for product in products])
    if weight is None:
        return None
    sizes, tape = [value.shape[2] for value in states], Tape(graph, node)
    # ONNX Runtime folds this when it loads the graph.
    dtype = states[0].dtype
    biases = [
        each.bias or tape.constant(np.zeros(size, dtype.numpy())) for each, size in zip(projections, sizes, strict=True)
    ]
    operands = [products[0].inputs[0], weight, tape.op("Concat", biases, [sum(sizes)], dtype, axis=0)]
    attributes = {"num_heads": heads.pop(), "qkv_hidden_sizes": sizes, "scale": _scale(node)}
    if mask.given is not None:
        operands.append(masks.as_int32(mask.given))
        attributes["mask_filter_value"] = _MASKED
    shape = [*states[0].shape[:2], sizes[2]]
    return tape.op("Attention", operands, shape, dtype, domain="com.microsoft", **attributes)


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
