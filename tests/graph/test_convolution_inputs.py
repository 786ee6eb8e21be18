"""Pairs on convolutions of one, two and three dimensions, against PyTorch's convolution of each row in float64."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from lora_export.errors import InputRefused
from lora_export.graph.adapter_inputs import add_adapter_inputs, attach_defaults
from lora_export.graph.sites import NAME_SCOPES
from lora_export.site_choice import SiteChoice

IN, OUT, KERNEL = 3, 5, (2, 3, 2)
SIZES = (7, 8, 6)
STRIDES, PADDING = (2, 1, 2), (1, 0, 1)
CONVOLVE = {1: torch.nn.functional.conv1d, 2: torch.nn.functional.conv2d, 3: torch.nn.functional.conv3d}


def convolution(n_axes: int, first_axis: str = "batch") -> ir.Model:
    """`conv(x)` of an unbound weight and bias, as the exporter records it; x comes first under another name."""
    float32 = ir.TensorType(ir.DataType.FLOAT)
    given = ir.Value(name="x", type=float32, shape=ir.Shape(["batch", IN, *SIZES[:n_axes]]))
    before = ir.node("Identity", [given])
    x = before.outputs[0]
    x.name, x.type, x.shape = "seen", float32, ir.Shape([first_axis, IN, *SIZES[:n_axes]])
    weight = ir.Value(name="conv.weight", type=float32, shape=ir.Shape([OUT, IN, *KERNEL[:n_axes]]))
    bias = ir.Value(name="conv.bias", type=float32, shape=ir.Shape([OUT]))
    attributes = {"strides": STRIDES[:n_axes], "pads": PADDING[:n_axes] * 2}
    scopes = {NAME_SCOPES: "['', 'conv', 'conv2d']"}
    node = ir.node("Conv", [x, weight, bias], attributes=attributes, metadata_props=scopes)
    node.outputs[0].name, node.outputs[0].type = "y", float32
    graph = ir.Graph([given], [node.outputs[0]], nodes=[before, node], opset_imports={"": 20}, name="convolution")
    for value in (weight, bias):
        graph.initializers[value.name] = value
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("n_axes", [1, 2, 3])
def test_each_row_has_its_own_pair_and_bias(n_axes: int, rows: int) -> None:
    rng = np.random.default_rng(n_axes)

    def random(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    model = convolution(n_axes)
    weight, bias = random(OUT, IN, *KERNEL[:n_axes]), random(OUT)
    model, entries = add_adapter_inputs(model, SiteChoice(convolution_modules=("conv",), bias_modules=("conv",)))
    attach_defaults(model.graph, entries)
    for name, array in {"conv.weight": weight, "conv.bias": bias.reshape(1, 1, OUT)}.items():
        value = model.graph.initializers.get(name)
        if value is not None:
            value.const_value = ir.tensor(array, name=name)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    x, rank, features = random(4, IN, *SIZES[:n_axes]), 2, IN * int(np.prod(KERNEL[:n_axes]))
    pair = {"conv.lora_A.weight": random(rows, features, rank), "conv.lora_B.weight": random(rows, rank, OUT)}
    own_bias = random(rows, 1, OUT)

    def expected(row: int, pair: dict, own_bias: np.ndarray) -> np.ndarray:
        of_row = row if rows > 1 else 0
        total = torch.from_numpy(weight).double()
        if pair:
            a, b = (torch.from_numpy(array[of_row]).double() for array in pair.values())
            total = total + (a @ b).T.reshape(total.shape)
        y = CONVOLVE[n_axes](
            torch.from_numpy(x[row : row + 1]).double(), total, None, STRIDES[:n_axes], PADDING[:n_axes]
        )
        return (y + torch.from_numpy(own_bias.reshape(1, OUT, *[1] * n_axes)).double()).numpy()

    served = session.run(None, {"x": x} | pair | {"conv.bias": own_bias})[0]
    for row in range(4):
        of_row = own_bias[row if rows > 1 else 0]
        np.testing.assert_allclose(served[row : row + 1], expected(row, pair, of_row), atol=1e-5)
    for _ in range(2):  # a buffer that another run has used
        base = session.run(None, {"x": x})[0]
        np.testing.assert_allclose(base[:1], expected(0, {}, bias), atol=1e-5)


def test_an_input_that_does_not_start_with_the_batch_is_refused() -> None:
    with pytest.raises(InputRefused, match="not called on the batch"):
        add_adapter_inputs(convolution(2, "windows"), SiteChoice(convolution_modules=("conv",)))


def test_a_module_that_is_no_convolution_of_the_graph_is_refused() -> None:
    with pytest.raises(InputRefused) as refused:
        add_adapter_inputs(convolution(2), SiteChoice(convolution_modules=("other",)))
    assert refused.value.where == "other"
