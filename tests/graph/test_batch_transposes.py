"""A transposed batch that ONNX Runtime cannot multiply is taken apart; one that it can stays."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from lora_export.graph.batch_transposes import take_batch_transposes_apart


def product(shape: list[int], other: list[int], **attributes: int) -> ir.Model:
    a, b = (
        ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(ir.DataType.FLOAT))
        for name, dims in (("a", shape), ("b", other))
    )
    node = ir.node("FusedMatMul", [a, b], attributes=attributes, domain="com.microsoft")
    node.outputs[0].name, node.outputs[0].dtype = "y", ir.DataType.FLOAT
    graph = ir.Graph([a, b], node.outputs, nodes=[node], opset_imports={"": 20, "com.microsoft": 1})
    return ir.Model(graph, ir_version=10)


def run(model: ir.Model, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"a": a, "b": b})[0]


@pytest.mark.parametrize("transposed", [0, 1])
def test_a_weight_beside_a_transposed_batch(transposed):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 5, 4)).astype(np.float32), rng.normal(size=(4, 3)).astype(np.float32)
    if transposed:
        b = rng.normal(size=(2, 3)).astype(np.float32)
    moved = a.transpose(1, 0, 2)
    expected = (moved.transpose(0, 2, 1) if transposed else moved) @ b
    model = product([2, 5, 4], list(b.shape), transBatchA=1, transA=transposed)
    with pytest.raises(Exception, match="same rank"):
        run(model, a, b)
    found = run(take_batch_transposes_apart(model), a, b)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_two_operands_of_one_rank_stay():
    model = product([2, 5, 4], [5, 4, 3], transBatchA=1)
    take_batch_transposes_apart(model)
    assert [node.op_type for node in model.graph] == ["FusedMatMul"]
