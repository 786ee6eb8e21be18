"""Heads are merged where the tokens stay what they were."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from lora_export.graph.heads import before_heads, read_instead

FLOAT = ir.TensorType(ir.DataType.FLOAT)


def attention(rows: object, tokens: object) -> tuple[ir.Graph, ir.Value, ir.Value, ir.Value]:
    """States `[batch, 8, 16]` split into heads of `rows` and `tokens`, an operator on them, and its result merged."""
    x = ir.Value(name="x", shape=ir.Shape(["batch", 8, 16]), type=FLOAT)
    split = ir.node("Reshape", [x, ir.Value(name="split")])
    heads = ir.node("Transpose", [split.outputs[0]], attributes={"perm": [0, 2, 1, 3]})
    operator = ir.node("Identity", [heads.outputs[0]])
    back = ir.node("Transpose", [operator.outputs[0]], attributes={"perm": [0, 2, 1, 3]})
    merged = ir.node("Reshape", [back.outputs[0], ir.Value(name="merge")])
    reader = ir.node("Identity", [merged.outputs[0]])
    for node, shape in (
        (heads, [rows, 4, tokens, 4]), (operator, [rows, 4, tokens, 4]), (merged, ["batch", 8, 16]), (reader, None),
    ):  # fmt: skip
        node.outputs[0].shape, node.outputs[0].type = None if shape is None else ir.Shape(shape), FLOAT
    nodes = [split, heads, operator, back, merged, reader]
    graph = ir.Graph([x], [reader.outputs[0]], nodes=nodes, opset_imports={"": 23}, name="heads")
    return graph, x, heads.outputs[0], operator.outputs[0]


def test_states_that_were_just_split_are_what_they_were():
    _, x, split, _ = attention("batch", 8)
    assert before_heads(split) is x


@pytest.mark.parametrize(
    ("rows", "tokens"), [("blocks", 4), ("batch", 4), (None, 8)], ids=["blocks", "fewer tokens", "an unknown batch"]
)
def test_blocks_of_a_sequence_are_not_the_sequence(rows, tokens):
    graph, _, split, result = attention(rows, tokens)
    assert before_heads(split) is None
    attended = ir.node("Identity", [split])
    attended.outputs[0].shape, attended.outputs[0].type = ir.Shape([rows, tokens, 16]), FLOAT
    graph.insert_after(split.producer(), attended)
    read_instead(result, attended.outputs[0])
    (reader,) = [node for node, _ in attended.outputs[0].uses()]
    assert reader.op_type == "Reshape", "its heads are taken apart again"
