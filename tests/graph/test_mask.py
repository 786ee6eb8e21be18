"""A mask is known by what it lets through, however it is computed."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir import tape

from lora_export.graph.mask import CausalMask, causal_mask, is_false_for_real_tokens


def allowed(attention_mask: list[list[int]], new: int, window: int | None = None) -> np.ndarray:
    """By plain loops."""
    batch, total = len(attention_mask), len(attention_mask[0])
    found = np.zeros((batch, new, total), bool)
    for row in range(batch):
        for q in range(new):
            for k in range(total):
                place = total - new + q
                near = window is None or k > place - window
                found[row, q, k] = k <= place and near and attention_mask[row][k] == 1
    return found


@pytest.mark.parametrize("window", [None, 2])
def test_a_causal_mask_is_what_plain_loops_say(window):
    mask = [[0, 1, 1, 1, 1], [1, 1, 0, 1, 0]]
    for new in (1, 3, 5):
        assert np.array_equal(CausalMask(window).allows(np.array(mask), new), allowed(mask, new, window))


def masked(*, window: int | None = None, additive: bool = False, shifted: int = 0, ignores_padding: bool = False):
    """A graph whose output is a mask, computed in a way of its own."""
    mask = ir.Value(
        name="attention_mask",
        shape=ir.Shape(["batch_size", "total_sequence_length"]),
        type=ir.TensorType(ir.DataType.INT64),
    )
    ids = ir.Value(
        name="input_ids", shape=ir.Shape(["batch_size", "sequence_length"]), type=ir.TensorType(ir.DataType.INT64)
    )
    op = tape.Tape()

    def ints(*values: int) -> ir.Value:
        return op.op("Constant", [], attributes={"value": ir.tensor(np.array(values, np.int64))})

    def scalar(value: int) -> ir.Value:
        return op.op("Constant", [], attributes={"value": ir.tensor(np.array(value, np.int64))})

    total = op.op("Squeeze", [op.op("Shape", [mask], attributes={"start": 1, "end": 2})])
    new = op.op("Squeeze", [op.op("Shape", [ids], attributes={"start": 1, "end": 2})])
    keys = op.op("Range", [scalar(0), total, scalar(1)])
    queries = op.op("Unsqueeze", [op.op("Range", [op.op("Sub", [total, new]), total, scalar(1)]), ints(1)])
    seen = op.op("LessOrEqual", [keys, op.op("Add", [queries, scalar(shifted)])])
    if window is not None:
        seen = op.op("And", [seen, op.op("Greater", [keys, op.op("Sub", [queries, scalar(window)])])])
    real = op.op("Cast", [op.op("Unsqueeze", [mask, ints(1, 2)])], attributes={"to": ir.DataType.BOOL})
    found = op.op("Expand", [seen, op.op("Shape", [real])]) if ignores_padding else op.op("And", [seen, real])
    if additive:
        lowest = op.op("Constant", [], attributes={"value": ir.tensor(np.array(np.finfo(np.float32).min, np.float32))})
        zero = op.op("Constant", [], attributes={"value": ir.tensor(np.array(0, np.float32))})
        found = op.op("Where", [found, zero, lowest])
    graph = ir.Graph([ids, mask], [found], nodes=op.nodes, opset_imports={"": 23}, name="mask")
    return graph, found


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("window", [None, 3])
def test_a_mask_is_known_by_what_it_lets_through(window, additive):
    found = causal_mask(*masked(window=window, additive=additive), windows=(3, 5))
    assert found == CausalMask(window)


@pytest.mark.parametrize(
    "other", [{"shifted": 1}, {"shifted": -1}, {"ignores_padding": True}, {"window": 4}],
    ids=["looks ahead", "not itself", "padding is seen", "another window"],
)  # fmt: skip
def test_another_mask_is_not_taken_for_causal(other):
    assert causal_mask(*masked(**other), windows=(3, 5)) is None


def test_a_window_that_is_not_looked_for_is_no_plain_mask():
    """Longer than every short case, and named by no config."""
    assert causal_mask(*masked(window=40), windows=()) is None
    assert causal_mask(*masked(window=40), windows=(40,)) == CausalMask(40)


def test_a_mask_that_reads_a_weight_or_another_operator_is_none():
    graph, mask = masked()
    weight = ir.Value(name="bias", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.BOOL))
    graph.initializers["bias"] = weight
    node = ir.node("And", [mask, weight])
    graph.append(node)
    assert causal_mask(graph, node.outputs[0], ()) is None
    graph, mask = masked()
    node = ir.node("Own", [mask], domain="elsewhere")
    graph.append(node)
    assert causal_mask(graph, node.outputs[0], ()) is None


def test_a_mask_that_cannot_be_run_is_none():
    graph, mask = masked()
    shape = ir.node("Constant", [], attributes={"value": ir.tensor(np.array([7, 7, 7], np.int64))})
    reshaped = ir.node("Reshape", [mask, shape.outputs[0]])
    graph.extend([shape, reshaped])
    assert causal_mask(graph, reshaped.outputs[0], ()) is None


def test_what_is_true_for_padding_alone():
    graph, mask = masked()
    counted = ir.node("Cast", [mask], attributes={"to": ir.DataType.FLOAT})
    axes = ir.node("Constant", [], attributes={"value": ir.tensor(np.array([-1], np.int64))})
    total = ir.node("ReduceSum", [counted.outputs[0], axes.outputs[0]], attributes={"keepdims": 1})
    one, two = (ir.node("Constant", [], attributes={"value": ir.tensor(np.array(n, np.float32))}) for n in (1, 2))
    none, few = ir.node("Less", [total.outputs[0], one.outputs[0]]), ir.node("Less", [total.outputs[0], two.outputs[0]])
    graph.extend([counted, axes, total, one, two, none, few])
    assert is_false_for_real_tokens(graph, none.outputs[0])
    assert not is_false_for_real_tokens(graph, few.outputs[0]), "the first token of a row attends itself alone"
