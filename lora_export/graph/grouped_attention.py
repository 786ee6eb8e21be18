"""One GroupQueryAttention a layer for decoders with a cache: no mask, no heads written out, the cache in place.

`Attention(q, Concat(past_key, k), Concat(past_value, v), mask)` of every layer becomes
`GroupQueryAttention(q, k, v, past_key, past_value, seqlens_k, total_sequence_length)`, on tokens in the cache's order
(`token_order.py`). The order is the same for all layers, so it is all of them or none:

1. every cache is held by one `Attention`, as its keys and its values;
2. every mask is causal, with or without a window (`mask.py`);
3. nothing else is computed from `attention_mask` or from the length of a cache: in a buffer that a host shares, a cache
   is longer than the tokens in it;
4. the provider has the operator in the graph's dtype.

A row's padding may stand on either side or between its tokens. A window counts tokens only, not the padding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import common as common_passes

from lora_export.base.recipe import Recipe
from lora_export.contract import PAST, PRESENT, CacheLayout
from lora_export.graph.attention_node import GROUPED, attended, is_plain
from lora_export.graph.grouped_projections import ProjectionPacker
from lora_export.graph.head import last_hidden
from lora_export.graph.heads import merged_heads, read_instead
from lora_export.graph.mask import CausalMask, causal_mask, is_false_for_real_tokens
from lora_export.graph.rotary import Rotary, Rotation, unturned
from lora_export.graph.token_order import TokenOrder

_DTYPES = {
    "cpu": (ir.DataType.FLOAT, ir.DataType.FLOAT16),
    "cuda": (ir.DataType.FLOAT16, ir.DataType.BFLOAT16),
}


@dataclass(frozen=True)
class _Layer:
    """A layer's attention and its cache.

    Attributes:
        past: The graph's inputs for keys and values, `[batch, heads, past, size]`.
        present: Its outputs, `[batch, heads, total, size]`.
        new: The keys and values of the new tokens, `[batch, heads, sequence, size]`.
        attended: What is read of the attention, `[batch, query heads, sequence, size]`.
    """

    node: ir.Node
    past: tuple[ir.Value, ir.Value]
    present: tuple[ir.Value, ir.Value]
    new: tuple[ir.Value, ir.Value]
    attended: ir.Value


def group_attention(
    model: ir.Model,
    provider: str,
    windows: tuple[int, ...] = (),
    *,
    longest: Sequence[int] = (),
    may_pack: Callable[[Recipe], bool] = lambda recipe: True,
) -> ir.Model:
    """Rewrite `model` (changed in place and returned) if the conditions hold.

    Args:
        windows: The sizes of sliding windows that the base's config names.
        longest: The most tokens of a text, by the base's config: `base.trace.longest_texts`.
        may_pack: Which weights may be packed, by their recipe.
    """
    graph = model.graph
    layers = _layers(graph, provider)
    hidden = last_hidden(graph)
    if not layers or hidden is None or not _is_free_of_slots(graph, layers):
        return model
    masks = {mask: causal_mask(graph, mask, windows) for mask in {layer.node.inputs[3] for layer in layers}}
    if None in masks.values():
        return model
    rotary = Rotary(graph, longest)
    rotations = [rotary.of(layer.node.inputs[0], layer.new[0]) for layer in layers]
    order = TokenOrder(graph, hidden)
    packer = ProjectionPacker(graph, order.sizes, may_pack)
    for layer, rotation in zip(layers, rotations, strict=True):
        _attend(graph, layer, order, mask=masks[layer.node.inputs[3]], rotation=rotation, packer=packer)
    model.graph.opset_imports.setdefault("com.microsoft", 1)
    common_passes.RemoveUnusedNodesPass()(model)
    common_passes.TopologicalSortPass()(model)
    return model


def cache_layout(model: ir.Model) -> CacheLayout | None:
    """Where `model` keeps a token in its cache; None if it has no cache."""
    if not any(value.name.startswith(PAST) for value in model.graph.inputs):
        return None
    is_grouped = any(node.op_type == GROUPED for node in model.graph)
    return CacheLayout.TOKENS if is_grouped else CacheLayout.COLUMNS


def _layers(graph: ir.Graph, provider: str) -> list[_Layer]:
    """Conditions 1 and 4: the layers, or none."""
    inputs = {value.name: value for value in graph.inputs}
    caches = [name.removesuffix("key") for name in inputs if name.startswith(PAST) and name.endswith(".key")]
    # All layers read one condition, so it is run once.
    is_of_padding = functools.cache(functools.partial(is_false_for_real_tokens, graph))
    found = [_layer(inputs[f"{cache}key"], inputs[f"{cache}value"], is_of_padding) for cache in caches]
    usable = all(layer is not None and layer.past[0].dtype in _DTYPES[provider] for layer in found)
    return found if usable and len({layer.node for layer in found}) == len(found) else []


def _layer(key: ir.Value, value: ir.Value, is_of_padding: Callable[[ir.Value], bool]) -> _Layer | None:
    halves = (_appended(key), _appended(value))
    if None in halves:
        return None
    present = tuple(node.outputs[0] for node in halves)
    users = [[use for use in half.uses() if use[0].op_type != "Shape"] for half in present]
    if any(len(uses) != 1 or not half.is_graph_output() for uses, half in zip(users, present, strict=True)):
        return None
    (node, at_key), (other, at_value) = users[0][0], users[1][0]
    if node is not other or (node.op_type, node.domain) != ("Attention", "") or (at_key, at_value) != (1, 2):
        return None
    if len(node.inputs) != 4 or node.inputs[3] is None or not is_plain(node) or not _has_groups(node):
        return None
    new = tuple(half.inputs[1] for half in halves)
    return _Layer(node, (key, value), present, new, attended(node, is_of_padding))


def _has_groups(node: ir.Node) -> bool:
    """Whether one number of query heads reads each head of keys and of values, all of one size."""
    heads = [value.shape[1] for value in node.inputs[:3]]
    sizes = {value.shape[3] for value in node.inputs[:3]}
    return len(sizes) == 1 and sizes.pop() % 8 == 0 and heads[0] % heads[1] == 0 and heads[1] == heads[2]


def _is_read_alone(states: ir.Value, source: ir.Value) -> bool:
    """Whether `states` is made of `source` by nodes of which nothing else reads."""
    value = states
    while value is not source:
        if value.producer() is None or len(tuple(value.uses())) != 1:
            return False
        value = value.producer().inputs[0]
    return True


def _appended(past: ir.Value) -> ir.Node | None:
    """The node that appends new tokens to `past`, its only use but for shapes."""
    users = [node for node, _ in past.uses() if node.op_type != "Shape"]
    if len(users) != 1 or users[0].op_type != "Concat" or len(users[0].inputs) != 2 or users[0].inputs[0] is not past:
        return None
    return users[0] if users[0].attributes.get_int("axis") in (-2, 2) else None


def _is_free_of_slots(graph: ir.Graph, layers: list[_Layer]) -> bool:
    """Condition 3."""
    replaced = {layer.attended.producer(): layer for layer in layers}
    seen: set[ir.Node] = set()
    appended = {present.producer() for layer in layers for present in layer.present}
    waiting = [value.producer() for value in graph.outputs]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen or node in appended:
            continue
        seen.add(node)
        if node in replaced:
            layer = replaced[node]
            operands = (layer.node.inputs[0], *layer.new)
        else:
            operands = tuple(value for value in node.inputs if value is not None)
        if any(_is_of_slots(node, value) for value in operands if node not in replaced):
            return False
        waiting += [value.producer() for value in operands]
    return True


def _is_of_slots(node: ir.Node, value: ir.Value) -> bool:
    """Whether `node` reads in `value` how the cache's slots are filled, or how many there are."""
    is_mask = value.is_graph_input() and value.name == "attention_mask"
    is_cache = value.is_graph_input() and value.name.startswith(PAST)
    if not is_mask and not is_cache and not (value.is_graph_output() and value.name.startswith(PRESENT)):
        return False
    slots = 1 if is_mask else 2
    axes = range(len(value.shape))[node.attributes.get_int("start", 0) : node.attributes.get_int("end", 4)]
    return node.op_type != "Shape" or slots in axes


def _attend(
    graph: ir.Graph,
    layer: _Layer,
    order: TokenOrder,
    *,
    mask: CausalMask,
    rotation: Rotation | None,
    packer: ProjectionPacker,
) -> None:
    node, (key, value) = layer.node, layer.past
    query = node.inputs[0]
    size = query.shape[3]
    attributes = {"num_heads": query.shape[1], "kv_num_heads": key.shape[1]}
    attributes["scale"] = node.attributes.get_float("scale", size**-0.5)
    if mask.window is not None:
        attributes["local_window_size"] = mask.window
    nodes: list[ir.Node] = []
    turned = (query, layer.new[0])
    operands = [merged_heads(nodes, states) if rotation is None else unturned(nodes, states) for states in turned]
    operands.append(merged_heads(nodes, layer.new[1]))
    is_alone = all(map(_is_read_alone, (*turned, layer.new[1]), operands))
    packed = packer.packed(operands) if is_alone else None
    operands = [packed, None, None] if packed is not None else operands
    operands += [key, value, order.lengths, order.total]
    if rotation is not None:
        operands += [rotation.cos, rotation.sin]
        attributes |= {"do_rotary": 1, "rotary_interleaved": int(rotation.is_interleaved)}
    grouped = ir.node(
        GROUPED,
        operands,
        attributes=attributes,
        domain="com.microsoft",
        num_outputs=3,
        metadata_props=dict(node.metadata_props),
    )
    nodes.append(grouped)
    result, *present = grouped.outputs
    result.dtype, result.shape = query.dtype, ir.Shape([query.shape[0], query.shape[2], query.shape[1] * size])
    graph.insert_before(node, nodes)
    read_instead(layer.attended, result)
    for old, new in zip(layer.present, present, strict=True):
        new.name, old.name = old.name, f"{old.name}.appended"
        new.type, new.shape = old.type, old.shape
        graph.outputs[list(graph.outputs).index(old)] = new
