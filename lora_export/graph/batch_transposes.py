"""Take apart what ONNX Runtime's `FusedMatMul` cannot do: a batch transposed beside an operand of another rank.

onnxscript folds a Transpose that moves the first axis before the last (`[batch, sequence, n]` to
`[sequence, batch, n]`) into `transBatchA` or `transBatchB`, whatever the other operand. ONNX Runtime wants two
operands of the same rank, at least 3, and fails when it runs (SigLIP's pooling head, which multiplies by a weight).
"""

from __future__ import annotations

import onnx_ir as ir

_OPERANDS = (("transBatchA", 0), ("transBatchB", 1))


def take_batch_transposes_apart(model: ir.Model) -> ir.Model:
    """Give every such node of `model` (changed in place and returned) a Transpose of its operand instead."""
    for node in list(model.graph):
        if node.op_type != "FusedMatMul" or node.domain != "com.microsoft":
            continue
        ranks = [None if value.shape is None else len(value.shape) for value in node.inputs]
        if None not in ranks and ranks[0] == ranks[1] and ranks[0] >= 3:
            continue
        for attribute, place in _OPERANDS:
            if node.attributes.get_int(attribute, 0) and (rank := ranks[place]) is not None:
                _transpose(model.graph, node, place, rank=rank)
                node.attributes[attribute] = ir.AttrInt64(attribute, 0)
    return model


def _transpose(graph: ir.Graph, node: ir.Node, place: int, *, rank: int) -> None:
    value, perm = node.inputs[place], [*range(1, rank - 1), 0, rank - 1]
    transpose = ir.node("Transpose", [value], attributes={"perm": perm}, metadata_props=dict(node.metadata_props))
    moved = transpose.outputs[0]
    moved.dtype, moved.shape = value.dtype, ir.Shape([value.shape[axis] for axis in perm])
    graph.insert_before(node, transpose)
    node.replace_input_with(place, moved)
