"""A mask of keys is known by what it lets through, however it is computed."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir import tape

from lora_export.graph.key_mask import is_false_with_keys, key_mask

INT64, BOOL, FLOAT = ir.DataType.INT64, ir.DataType.BOOL, ir.DataType.FLOAT


def given(name: str, *axes: str) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(axes), type=ir.TensorType(INT64))


class Graph:
    """A graph with `mask` computed from `attention_mask` and `input_ids`, in a way of its own."""

    def __init__(self, *, other: str | None = None, additive: bool = False) -> None:
        self.given = given("attention_mask", "batch_size", "sequence_length")
        ids = given("input_ids", "batch_size", "sequence_length")
        second = given("other_attention_mask", "batch_size", "sequence_length")
        self._op = tape.Tape()
        attended = self.op("Unsqueeze", [self.op("Cast", [self.given], to=BOOL), self.ints([1, 2])])
        if other == "tokens":
            is_pad = self.op("Equal", [ids, self.constant(np.array(7))])
            real = self.op("Unsqueeze", [self.op("Not", [is_pad]), self.ints([1, 2])])
            attended = self.op("And", [attended, real])
        if other == "second":
            also = self.op("Unsqueeze", [self.op("Cast", [second], to=BOOL), self.ints([1, 2])])
            attended = self.op("And", [attended, also])
        length = self.op("Shape", [ids], start=1, end=2)
        square = self.op("Concat", [self.ints([1, 1]), length, length], axis=0)
        whole = self.op("Expand", [self.constant(np.array(True)), square])
        if other == "causal":
            whole = self.op("Trilu", [whole], upper=0)
        if other == "window":
            places = self.op(
                "Range", [self.constant(np.array(0)), self.op("Squeeze", [length]), self.constant(np.array(1))]
            )
            distance = self.op("Abs", [self.op("Sub", [self.op("Unsqueeze", [places, self.ints([1])]), places])])
            whole = self.op("LessOrEqual", [distance, self.constant(np.array(64))])
        if other == "all":
            attended = whole
        self.mask = self.op("And", [attended, whole])
        if additive:
            numbers = [self.constant(np.array(n, np.float32)) for n in (0, -3e38)]
            self.mask = self.op("Where", [self.mask, *numbers])
        if other == "bias":
            self.mask = self.op("Add", [self.mask, self.constant(np.array(0.5, np.float32))])
        self.graph = ir.Graph(
            [ids, self.given, second], [self.mask], nodes=self._op.nodes, opset_imports={"": 23}, name="mask"
        )

    def op(self, op_type: str, inputs: list[ir.Value], **attributes) -> ir.Value:
        return self._op.op(op_type, inputs, attributes=attributes)

    def constant(self, array: np.ndarray) -> ir.Value:
        return self.op("Constant", [], value=ir.tensor(array))

    def ints(self, numbers: list[int]) -> ir.Value:
        return self.constant(np.array(numbers, np.int64))


@pytest.mark.parametrize("additive", [False, True])
def test_padding_is_a_mask_of_keys(additive):
    made = Graph(additive=additive)
    assert key_mask(made.graph, made.mask).given is made.given


def test_a_mask_that_lets_all_through_needs_none():
    made = Graph(other="all")
    assert key_mask(made.graph, made.mask).given is None
    assert key_mask(made.graph, None).given is None


@pytest.mark.parametrize(
    "other", [{"other": "causal"}, {"other": "window"}, {"other": "tokens"}, {"other": "second"},
              {"other": "bias", "additive": True}],
    ids=["of the query too", "a wide window", "of the tokens' numbers", "of another mask", "adds something else"],
)  # fmt: skip
def test_another_mask_is_none_of_keys(other):
    made = Graph(**other)
    assert key_mask(made.graph, made.mask) is None


def test_what_is_true_for_rows_without_keys_alone():
    # A padded row keeps two keys at least.
    for least, expected in ((1, True), (3, False)):
        made = Graph()
        nodes = tape.Tape()
        counted = nodes.op("Cast", [made.mask], attributes={"to": FLOAT})
        axes = nodes.op("Constant", [], attributes={"value": ir.tensor(np.array([-1], np.int64))})
        total = nodes.op("ReduceSum", [counted, axes], attributes={"keepdims": 1})
        few = nodes.op("Less", [total, nodes.op("Constant", [], attributes={"value": ir.tensor(np.float32(least))})])
        made.graph.extend(nodes.nodes)
        assert is_false_with_keys(made.graph, few) is expected
