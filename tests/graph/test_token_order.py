"""Tokens are brought into the cache's order and back, wherever the padding stands."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from lora_export.graph.token_order import TokenOrder


def ordered() -> ort.InferenceSession:
    """`seen`: the token ids as a layer reads them; `y`: them again, in the order given."""

    def value(name: str, dims: list, dtype: ir.DataType = ir.DataType.INT64) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(dtype))

    ids = value("input_ids", ["batch_size", "sequence_length"])
    mask = value("attention_mask", ["batch_size", "total_sequence_length"])
    gate = value("lora_gate", ["rows", "gated", 1], ir.DataType.FLOAT)
    graph = ir.Graph([ids, mask, gate], [], nodes=[], opset_imports={"": 23}, name="order")
    layer, gated, head = ir.node("Identity", [ids]), ir.node("Identity", [gate]), None
    layer.outputs[0].shape, layer.outputs[0].dtype = ids.shape, ids.dtype
    layer.outputs[0].name, gated.outputs[0].name = "hidden", "gated_as_read"
    head = ir.node("Identity", [layer.outputs[0]])
    factor = ir.node("Cast", [layer.outputs[0]], attributes={"to": ir.DataType.FLOAT})
    zero = ir.node("Sub", [factor.outputs[0], factor.outputs[0]])
    axes = ir.node("Constant", [], attributes={"value": ir.tensor(np.array([2], np.int64))})
    by_token = ir.node("Unsqueeze", [zero.outputs[0], axes.outputs[0]])
    # A gate on the head's own pair: of a node that reads the hidden states too.
    on_head = ir.node("Add", [by_token.outputs[0], gate])
    graph.extend([layer, gated, head, factor, zero, axes, by_token, on_head])
    order = TokenOrder(graph, layer.outputs[0])
    seen = ir.node("Identity", [layer.outputs[0]])
    graph.append(seen)
    outputs = {"y": head, "seen": seen, "gate": gated, "gate_on_head": on_head}
    for name, node in outputs.items():
        node.outputs[0].name, node.outputs[0].type = (
            name,
            ir.TensorType(ir.DataType.FLOAT if name.startswith("gate") else ir.DataType.INT64),
        )
        graph.outputs.append(node.outputs[0])
    order.lengths.name, order.total.name = "lengths", "total"
    graph.outputs.extend([order.lengths, order.total])
    graph.sort()
    model = ir.to_proto(ir.Model(graph, ir_version=10))
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def session() -> ort.InferenceSession:
    return ordered()


def run(session, ids, mask, gate=None) -> dict[str, np.ndarray]:
    gate = np.ones((1, 1, 1), np.float32) if gate is None else gate
    names = [output.name for output in session.get_outputs()]
    feeds = {"input_ids": np.array(ids), "attention_mask": np.array(mask), "lora_gate": gate}
    return dict(zip(names, session.run(names, feeds), strict=True))


@pytest.mark.parametrize(
    ("mask", "seen"),
    [([1, 1, 1, 1], [5, 6, 7, 8]), ([0, 0, 1, 1], [7, 8, 5, 6]), ([1, 1, 0, 0], [5, 6, 7, 8]),
     ([1, 0, 1, 1], [5, 7, 8, 6]), ([0, 0, 0, 0], [5, 6, 7, 8])],
    ids=["none", "left", "right", "between", "all"],
)  # fmt: skip
def test_real_tokens_come_first_and_go_back(mask, seen, session):
    found = run(session, [[5, 6, 7, 8], [1, 2, 3, 4]], [mask, [1, 1, 1, 1]])
    assert found["seen"].tolist() == [seen, [1, 2, 3, 4]]
    real = np.array(mask, bool)
    assert found["y"][0][real].tolist() == np.array([5, 6, 7, 8])[real].tolist()
    assert found["lengths"].tolist() == [3, 3] and found["total"] == 4


def test_padding_in_the_cache_and_among_the_new_tokens(session):
    mask = [[0, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 0]]
    found = run(session, [[5, 6], [7, 8]], mask)
    assert found["lengths"].tolist() == [2 + 2 - 1, 4 + 2 - 1], "the cache's tokens, and both new ones"
    assert found["seen"].tolist() == [[5, 6], [7, 8]] and found["total"] == 6


def test_one_new_token_stays_where_it_is(session):
    found = run(session, [[5], [7]], [[0, 1, 1], [1, 1, 1]])
    assert found["seen"].tolist() == [[5], [7]] == found["y"].tolist()
    assert found["lengths"].tolist() == [1, 2]


def test_the_gate_goes_along_with_its_tokens(session):
    gate = np.array([[[0], [0], [1], [0.5]], [[1], [2], [3], [4]]], np.float32)
    found = run(session, [[5, 6, 7, 8], [1, 2, 3, 4]], [[0, 0, 1, 1], [1, 1, 1, 1]], gate)
    assert found["gate"][:, :, 0].tolist() == [[1, 0.5, 0, 0], [1, 2, 3, 4]]
    assert found["gate_on_head"][:, :, 0].tolist() == gate[:, :, 0].tolist(), "its hidden states are as given"
    found = run(session, [[5, 6], [7, 8]], [[0, 1], [1, 1]], np.full((1, 1, 1), 0.25, np.float32))
    assert found["gate"].ravel().tolist() == [0.25] * 4, "one number serves every token"
