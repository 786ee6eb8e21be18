"""Reshapes that undo each other are dropped: `Reshape(Reshape(x))` in the shape of `x` is `x`."""

from __future__ import annotations

import onnx_ir as ir


def drop_undone_reshapes(model: ir.Model) -> ir.Model:
    """Let readers of a Reshape that gives back the shape of what was reshaped read that. Changed in place and returned.

    Two shapes are one where all dims but one at most are known, by number or by name: the last follows from the size.
    """
    for node in model.graph:
        if node.op_type != "Reshape" or node.outputs[0].is_graph_output():
            continue
        source = node.inputs[0]
        while (before := source.producer()) is not None and before.op_type == "Reshape":
            source = before.inputs[0]
            if _is_same_shape(source, node.outputs[0]):
                node.outputs[0].replace_all_uses_with(source)
                break
    return model


def _is_same_shape(one: ir.Value, other: ir.Value) -> bool:
    if one.shape is None or other.shape is None or len(one.shape) != len(other.shape):
        return False
    return sum(not is_known_equal(*dims) for dims in zip(one.shape, other.shape, strict=True)) <= 1


def is_known_equal(one: int | ir.SymbolicDim, other: int | ir.SymbolicDim) -> bool:
    """Whether two sizes are one, by number or by name; what has no name is equal to nothing."""
    return one == other and (isinstance(one, int) or one.value is not None)
