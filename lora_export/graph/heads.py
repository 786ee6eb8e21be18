"""Heads in one axis: `[batch, heads, sequence, size]` is what a trace gives, `[batch, sequence, heads·size]` what
attention operators read and write without moving anything."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lora_export.graph.reshapes import is_known_equal


def merged_heads(nodes: list[ir.Node], states: ir.Value) -> ir.Value:
    """`[batch, heads, sequence, size]` as `[batch, sequence, heads·size]`: undone if it was just made of that, else by
    nodes that are appended to `nodes`."""
    batch, heads, sequence, size = states.shape
    if (before := before_heads(states)) is not None:
        return before
    if _swaps_heads(states.producer()):
        by_token = states.producer().inputs[0]
    else:
        nodes.append(ir.node("Transpose", [states], attributes={"perm": [0, 2, 1, 3]}))
        by_token = nodes[-1].outputs[0]
    nodes.append(ir.node("Constant", [], attributes={"value": ir.tensor(np.array([0, 0, heads * size], np.int64))}))
    nodes.append(ir.node("Reshape", [by_token, nodes[-1].outputs[0]]))
    merged = nodes[-1].outputs[0]
    merged.dtype, merged.shape = states.dtype, ir.Shape([batch, sequence, heads * size])
    return merged


def before_heads(states: ir.Value) -> ir.Value | None:
    """The `[batch, sequence, heads·size]` that `states`, `[batch, heads, sequence, size]`, was just made of."""
    transpose = states.producer()
    if not _swaps_heads(transpose):
        return None
    split = transpose.inputs[0].producer()
    merged = split.inputs[0] if split is not None and split.op_type == "Reshape" else None
    return (
        merged if merged is not None and _holds_tokens_of(states, merged, states.shape[1] * states.shape[3]) else None
    )


def read_instead(old: ir.Value, attended: ir.Value) -> None:
    """Let the readers of `old`, `[batch, heads, sequence, size]`, read `attended`, `[batch, sequence, heads·size]`.

    Those that merge the heads read it as it is. For the others its heads are taken apart."""
    merging = _merging(old, attended.shape[2])
    if merging is not None:
        merging.replace_all_uses_with(attended)
        return
    batch, heads, sequence, size = old.shape
    target = ir.node("Constant", [], attributes={"value": ir.tensor(np.array([0, 0, heads, size], np.int64))})
    split = ir.node("Reshape", [attended, target.outputs[0]])
    split.outputs[0].dtype, split.outputs[0].shape = attended.dtype, ir.Shape([batch, sequence, heads, size])
    swapped = ir.node("Transpose", [split.outputs[0]], attributes={"perm": [0, 2, 1, 3]})
    swapped.outputs[0].dtype, swapped.outputs[0].shape = attended.dtype, old.shape
    old.producer().graph.insert_after(attended.producer(), [target, split, swapped])
    old.replace_all_uses_with(swapped.outputs[0])


def _swaps_heads(node: ir.Node | None) -> bool:
    return node is not None and node.op_type == "Transpose" and list(node.attributes.get_ints("perm")) == [0, 2, 1, 3]


def _merging(states: ir.Value, width: int) -> ir.Value | None:
    """The value `[batch, sequence, width]` that is all that `states`, `[batch, heads, sequence, size]`, is read for."""
    value, swapped = states, False
    while len(users := [node for node, _ in value.uses()]) == 1:
        node = users[0]
        if not swapped and _swaps_heads(node):
            swapped = True
        elif node.op_type != "Reshape" or node.inputs[0] is not value:
            return None
        value = node.outputs[0]
        if swapped and value.shape is not None and len(value.shape) == 3:
            return value if _holds_tokens_of(states, value, width) else None
    return None


def _holds_tokens_of(states: ir.Value, merged: ir.Value, width: int) -> bool:
    """Whether `merged` is `[batch, sequence, width]` of the same batch and sequence as `states`: blocks of a sequence
    have other ones."""
    if merged.shape is None or len(merged.shape) != 3 or merged.shape[2] != width:
        return False
    return is_known_equal(merged.shape[0], states.shape[0]) and is_known_equal(merged.shape[1], states.shape[2])
