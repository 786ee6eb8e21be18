"""A decoder's head runs for the last tokens only where a host says so, and for all where it does not."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from lora_export.contract import LOGITS_TO_KEEP
from lora_export.graph.head import keep_last_logits, last_hidden
from lora_export.runtime.adapter_session import AdapterSession
from lora_export.runtime.generate import left_pad

SIZE, VOCABULARY, RANK = 3, 5, 2
FLOAT = ir.DataType.FLOAT


def head(*, spoiled: bool = False) -> ir.Model:
    """`logits = x' W + ((x' A) ⊙ gate) B` of `x' = −x`; spoiled: less the mean over tokens."""

    def value(name: str, dims: list) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(FLOAT))

    x, gate = value("x", ["batch", "sequence", SIZE]), value("lora_gate", ["rows", "gate_length", 1])
    a, b = value("a", ["rows", SIZE, RANK]), value("b", ["rows", RANK, VOCABULARY])
    weight = value("weight", [SIZE, VOCABULARY])
    weight.const_value = ir.tensor(
        np.arange(SIZE * VOCABULARY, dtype=np.float32).reshape(SIZE, VOCABULARY), name="weight"
    )
    nodes = []

    def op(op_type: str, *inputs: ir.Value, last: object, **attributes) -> ir.Value:
        node = ir.node(op_type, inputs, attributes=attributes)
        node.outputs[0].shape, node.outputs[0].dtype = ir.Shape(["batch", "sequence", last]), FLOAT
        nodes.append(node)
        return node.outputs[0]

    hidden = op("Neg", x, last=SIZE)
    low = op("Mul", op("MatMul", hidden, a, last=RANK), gate, last=RANK)
    logits = op(
        "Add", op("MatMul", hidden, weight, last=VOCABULARY), op("MatMul", low, b, last=VOCABULARY), last=VOCABULARY
    )
    if spoiled:
        axis = ir.node("Constant", [], attributes={"value": ir.tensor(np.array([1], np.int64))})
        nodes.append(axis)
        logits = op("Sub", logits, op("ReduceMean", logits, axis.outputs[0], last=VOCABULARY), last=VOCABULARY)
    logits.name = "logits"
    graph = ir.Graph([x, gate, a, b], [logits], nodes=nodes, initializers=[weight], opset_imports={"": 23}, name="head")
    return ir.Model(graph, ir_version=10)


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["logits"], feeds)[0]


@pytest.mark.parametrize("gate_length", [1, 4])
def test_a_gate_on_the_heads_own_pair_is_cut_with_the_tokens(gate_length):
    random = np.random.default_rng(3)
    shapes = {"x": (2, 4, SIZE), "lora_gate": (2, gate_length, 1), "a": (2, SIZE, RANK), "b": (2, RANK, VOCABULARY)}
    feeds = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    whole = run(head(), feeds)
    model = keep_last_logits(head())
    for kept in (1, 3, 4, 9):
        found = run(model, feeds | {LOGITS_TO_KEEP: np.array(kept)})
        assert found.shape == (2, min(kept, 4), VOCABULARY)
        assert np.allclose(found, whole[:, -kept:], atol=1e-6)
    assert np.allclose(run(model, feeds), whole, atol=1e-6)
    assert np.abs(whole[:, :1] - whole[:, -1:]).min() > 1e-3, "another token's logits would be noticed"


def test_a_head_that_does_not_go_by_token_is_left_as_it_is():
    model = head(spoiled=True)
    assert last_hidden(model.graph) is not None
    n_nodes = len(list(model.graph))
    assert [value.name for value in keep_last_logits(model).graph.inputs] == ["x", "lora_gate", "a", "b"]
    assert len(list(model.graph)) == n_nodes


@pytest.mark.parametrize(
    ("export", "adapter"),
    [("llama-dynamic", "code"), ("llama-head", "speak"), ("llama-voice", "voice"), ("gpt2-dynamic", "poet")],
)
def test_the_last_logits_are_those_of_a_run_for_all(export, adapter, exports):
    session = AdapterSession(exports[export], "cpu")
    (optional,) = session.contract.optional_inputs
    assert (optional.name, optional.dtype, optional.dims) == (LOGITS_TO_KEEP, "int64", ())
    ids, mask = left_pad([[20, 30, 40, 50, 60], [99, 7]], pad_id=0)
    for order in (slice(None), slice(None, None, -1)):  # padding on the left, then on the right
        inputs = {"input_ids": ids[:, order], "attention_mask": mask[:, order]}
        whole = session.run(inputs, [adapter, None])["logits"]
        assert whole.shape[1] == 5
        for kept in (1, 2, 7):
            found = session.run({LOGITS_TO_KEEP: kept} | inputs, [adapter, None])["logits"]
            real = inputs["attention_mask"][:, -kept:].astype(bool)
            assert found.shape[1] == min(kept, 5)
            assert np.allclose(found[real], whole[:, -kept:][real], atol=1e-5)


def test_only_decoders_with_a_language_models_head_have_the_input(exports):
    for export in ("tagger-dynamic", "bert-dynamic", "vit-dynamic"):
        assert AdapterSession(exports[export], "cpu").contract.optional_inputs == ()
    graph = ir.load(exports["llama-cuda"] / "model.onnx").graph
    assert LOGITS_TO_KEEP in graph.initializers
