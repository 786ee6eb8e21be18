"""Which products of a given graph are the rows of one module: no other may be them too."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from lora_export.graph.matching import BaseMatrix, Matcher, given_weights

N_IN, N_GATE, N_UP = 8, 6, 4


def layers(same: bool) -> tuple[ir.Graph, Matcher, list[BaseMatrix]]:
    """Two layers, each with its gate and its up in products of their own; of the same numbers or not."""
    rng = np.random.default_rng(0)
    wholes = [rng.standard_normal((N_GATE + N_UP, N_IN)).astype(np.float32) for _ in range(2)]
    wholes = [wholes[0], wholes[0].copy()] if same else wholes
    inputs = [ir.Value(name=f"x{n}", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, N_IN])) for n in (0, 1)]
    nodes, weights = [], []
    for source, whole in zip(inputs, wholes, strict=True):
        for part in (whole[:N_GATE], whole[N_GATE:]):
            array = np.ascontiguousarray(part.T)
            weights.append(ir.Value(name=f"w{len(weights)}", const_value=ir.tensor(array), shape=ir.Shape(array.shape)))
            weights[-1].dtype = ir.DataType.FLOAT
            nodes.append(ir.node("MatMul", [source, weights[-1]]))
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=weights, opset_imports={"": 20})
    matrices = [BaseMatrix(f"layers.{n}.gate_up", N_IN, N_GATE + N_UP) for n in (0, 1)]
    matcher = Matcher(matrices, lambda matrix, rows, dtype: wholes[matrices.index(matrix)][rows].astype(dtype))
    return graph, matcher, matrices


def test_each_layer_has_its_own_parts():
    graph, matcher, matrices = layers(same=False)
    weights = given_weights(graph)
    found = [[weights.index(part) for part in matcher.parts_of(matrix, weights)] for matrix in matrices]
    assert found == [[0, 1], [2, 3]]


@pytest.mark.parametrize("layer", [0, 1])
def test_parts_that_fit_two_layers_are_nobodys(layer):
    graph, matcher, matrices = layers(same=True)
    assert matcher.parts_of(matrices[layer], given_weights(graph)) == []


def test_a_whole_weight_is_no_part():
    graph, matcher, _ = layers(same=False)
    gate = BaseMatrix("layers.0.gate_up", N_IN, N_GATE)
    matcher = Matcher([gate], lambda matrix, rows, dtype: graph.initializers["w0"].const_value.numpy().T[rows])
    assert matcher.parts_of(gate, given_weights(graph)) == []
