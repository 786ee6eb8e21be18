"""The embedding of a text as nodes of a graph, against loops in float64; and against sentence-transformers' formulas."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from lora_export.errors import InputRefused
from lora_export.graph.sentence import add_sentence_embedding
from lora_export.sentence import Activation, Dense, Pooling, SentenceEmbedding

SIZE = 5
MASK = np.array([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0]])
STATES = np.random.default_rng(3).standard_normal((*MASK.shape, SIZE)).astype(np.float32) - 0.7


def states_graph(dtype=ir.DataType.FLOAT, opset=18) -> ir.Model:
    """A graph that gives the states it is given."""
    states = ir.Value(name="states", shape=ir.Shape(["b", "s", SIZE]), type=ir.TensorType(dtype))
    mask = ir.Value(name="attention_mask", shape=ir.Shape(["b", "s"]), type=ir.TensorType(ir.DataType.INT64))
    node = ir.node("Identity", [states])
    (out,) = node.outputs
    out.name, out.shape, out.dtype = "last_hidden_state", ir.Shape(["b", "s", SIZE]), dtype
    graph = ir.Graph([states, mask], [out], nodes=[node], opset_imports={"": opset}, name="g")
    return ir.Model(graph, ir_version=10)


def embedded(embedding, weights=(), *, states=STATES, dtype=ir.DataType.FLOAT, opset=18) -> np.ndarray:
    model = add_sentence_embedding(states_graph(dtype, opset), embedding, weights)
    session = ort.InferenceSession(ir.serde.serialize_model(model).SerializeToString())
    return session.run(["sentence_embedding"], {"states": states, "attention_mask": MASK})[0]


def by_loops(way: Pooling, states: np.ndarray, mask: np.ndarray) -> list[float]:
    places = [place for place, real in enumerate(mask) if real]
    if not places:
        return [0.0] * SIZE
    rows = states.astype(np.float64)
    found = []
    for axis in range(SIZE):
        column = [float(rows[place, axis]) for place in places]
        weights = [place - places[0] + 1 for place in places]
        weighted = sum(w * rows[place, axis] for w, place in zip(weights, places, strict=True)) / sum(weights)
        found.append(
            {
                "cls": column[0], "lasttoken": column[-1], "max": max(column), "mean": sum(column) / len(column),
                "mean_sqrt_len_tokens": sum(column) / math.sqrt(len(column)), "weightedmean": weighted,
            }[way]
        )  # fmt: skip
    return found


@pytest.mark.parametrize("opset", [15, 18])
@pytest.mark.parametrize("way", Pooling)
def test_each_way_is_what_loops_compute(way, opset):
    expected = np.array([by_loops(way, *row) for row in zip(STATES, MASK, strict=True)])
    np.testing.assert_allclose(embedded(SentenceEmbedding((way,)), opset=opset), expected, atol=1e-6)
    expected /= np.maximum(np.linalg.norm(expected, axis=1, keepdims=True), 1e-12)
    np.testing.assert_allclose(embedded(SentenceEmbedding((way,), (None,)), opset=opset), expected, atol=1e-6)


def test_several_ways_stand_one_behind_the_other_and_layers_follow_in_order():
    rng = np.random.default_rng(5)
    weight, bias = rng.standard_normal((3, 2 * SIZE)).astype(np.float32), np.array([0.1, -0.2, 0.3], np.float32)
    ways = (Pooling.MAX, Pooling.MEAN)
    for activation, formula in (
        (Activation.TANH, np.tanh), (Activation.IDENTITY, lambda x: x), (Activation.RELU, lambda x: np.maximum(x, 0)),
        (Activation.SIGMOID, lambda x: 1 / (1 + np.exp(-x))),
        (Activation.GELU, np.vectorize(lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2)),
    ):  # fmt: skip
        layers = (Dense(2 * SIZE, 3, True, activation, "0" * 64), None)
        found = embedded(SentenceEmbedding(ways, layers), [{"weight": weight, "bias": bias}])
        pooled = [[x for way in ways for x in by_loops(way, *row)] for row in zip(STATES, MASK, strict=True)]
        expected = formula(np.array(pooled) @ weight.T.astype(np.float64) + bias)
        expected /= np.maximum(np.linalg.norm(expected, axis=1, keepdims=True), 1e-12)
        np.testing.assert_allclose(found, expected, atol=1e-6, err_msg=activation)


def test_a_sum_beyond_float16_is_taken_in_float32():
    states = np.full(STATES.shape, 30_000, np.float16)  # three of them are beyond 65,504
    embedding = SentenceEmbedding((Pooling.MEAN,), (None,))
    found = embedded(embedding, states=states, dtype=ir.DataType.FLOAT16)
    assert found.dtype == np.float16
    np.testing.assert_allclose(found[:3], 1 / math.sqrt(SIZE), atol=1e-3)


def test_a_layer_of_another_size_and_a_graph_without_states_are_refused():
    with pytest.raises(InputRefused, match="A Dense does not take what is pooled"):
        embedded(SentenceEmbedding((Pooling.CLS,), (Dense(4, 3, False, Activation.TANH, ""),)), [{}])
    model = states_graph()
    model.graph.outputs[0].name = "logits"
    with pytest.raises(InputRefused, match="The base has no states to pool"):
        add_sentence_embedding(model, SentenceEmbedding((Pooling.CLS,)), ())
    model.graph.outputs[0].name = "sentence_embedding"
    with pytest.raises(InputRefused, match="gives a sentence_embedding of its own"):
        add_sentence_embedding(model, SentenceEmbedding((Pooling.CLS,)), ())


def test_sentence_transformers_own_formulas_give_the_same():
    """As its `Pooling.forward` has them: sums over expanded masks, and the last token by a flipped mask."""
    import torch

    from lora_export.check.reference.sentence import SentenceReference

    states, mask = torch.from_numpy(STATES[:3]), torch.from_numpy(MASK[:3])
    expanded = mask.unsqueeze(-1).expand(states.size()).to(states.dtype)
    total, count = (states * expanded).sum(1), expanded.sum(1).clamp(min=1e-9)
    weights = torch.arange(1, states.shape[1] + 1).view(1, -1, 1) - mask.argmax(dim=1).view(-1, 1, 1)
    weights = weights.expand(states.size()).to(states.dtype) * expanded
    values, indices = mask.flip(1).max(1)
    last = states.shape[1] - torch.where(values == 0, states.shape[1] - 1, indices) - 1
    expected = {
        Pooling.MEAN: total / count,
        Pooling.MEAN_SQRT_LEN: total / count.sqrt(),
        Pooling.WEIGHTED_MEAN: (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9),
        Pooling.MAX: states.masked_fill(expanded == 0, -1e9).max(1)[0],
        Pooling.LAST_TOKEN: (states * expanded)[torch.arange(3), last],
        Pooling.CLS: states[torch.arange(3), mask.argmax(dim=1)],
    }
    assert expected.keys() == set(Pooling)
    for way, vectors in expected.items():
        reference = SentenceReference(SentenceEmbedding((way,)), ())(states, mask)
        torch.testing.assert_close(reference, vectors, msg=way)
        np.testing.assert_allclose(embedded(SentenceEmbedding((way,)))[:3], vectors, atol=1e-6, err_msg=way)
