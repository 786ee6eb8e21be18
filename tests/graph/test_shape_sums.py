"""A length that is added to a range moves into it; what is no length stays."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from lora_export.graph.shape_sums import start_ranges_at_sums


def constant(graph: ir.Graph, name: str, number: int) -> ir.Value:
    value = ir.Value(
        name=name, const_value=ir.tensor(np.array(number)), type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([])
    )
    graph.register_initializer(value)
    return value


def positions(start: int, *, length_is_shape: bool, swapped: bool = False) -> ir.Model:
    """`Range(start, new, 1) + length`, with `length` the axis of "past", or an input."""
    new = ir.Value(name="new", shape=ir.Shape(["n"]), type=ir.TensorType(ir.DataType.FLOAT))
    past = ir.Value(name="past", shape=ir.Shape(["p"]), type=ir.TensorType(ir.DataType.FLOAT))
    given = ir.Value(name="given", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64))
    graph = ir.Graph([new, past, given], [], nodes=[], opset_imports={"": 20}, name="positions")
    sizes = []
    for value in (new, past):
        shape = ir.node("Shape", [value])
        scalar = ir.node("Squeeze", [shape.outputs[0]])
        scalar.outputs[0].dtype, scalar.outputs[0].shape = ir.DataType.INT64, ir.Shape([])
        graph.extend([shape, scalar])
        sizes.append(scalar.outputs[0])
    counted = ir.node("Range", [constant(graph, "start", start), sizes[0], constant(graph, "step", 1)])
    length = sizes[1] if length_is_shape else given
    operands = [counted.outputs[0], length]
    total = ir.node("Add", operands[::-1] if swapped else operands)
    total.outputs[0].name, total.outputs[0].dtype, total.outputs[0].shape = "y", ir.DataType.INT64, ir.Shape(["m"])
    graph.extend([counted, total])
    graph.outputs.append(total.outputs[0])
    return ir.Model(graph, ir_version=10)


def run(model: ir.Model) -> list[int]:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {"new": np.zeros(5, np.float32), "past": np.zeros(7, np.float32), "given": np.array(7)}
    return session.run(None, feeds)[0].tolist()


@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("swapped", [False, True])
def test_the_range_starts_at_the_length(start, swapped):
    model = start_ranges_at_sums(positions(start, length_is_shape=True, swapped=swapped))
    last = model.graph.outputs[0].producer()
    assert last.op_type == "Range" and model.graph.outputs[0].name == "y"
    assert run(model) == list(range(start + 7, 5 + 7))


def test_a_number_that_is_no_length_is_added_as_before():
    model = start_ranges_at_sums(positions(0, length_is_shape=False))
    assert model.graph.outputs[0].producer().op_type == "Add"
    assert run(model) == list(range(7, 12))
