"""What is made of a norm's weight is a constant under the weight's name, and the same for every layer."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lora_export.base.layers import Stack
from lora_export.graph.derived import fold_derived
from lora_export.graph.layer_names import derived_of_all

WEIGHT = "layers.1.norm.weight"


def norm_graph(array: np.ndarray) -> ir.Model:
    """x · (1 + float32(w)), and x · w."""
    x = ir.Value(name="x", shape=ir.Shape(["n", 3]), type=ir.TensorType(ir.DataType.FLOAT))
    weight = ir.Value(name=WEIGHT, const_value=ir.tensor(array))
    weight.dtype, weight.shape = weight.const_value.dtype, weight.const_value.shape
    one = ir.node("Constant", [], attributes={"value": ir.tensor(np.array(1.0, np.float32))})
    cast = ir.node("Cast", [weight], attributes={"to": ir.DataType.FLOAT})
    add = ir.node("Add", [one.outputs[0], cast.outputs[0]])
    products = [ir.node("Mul", [x, add.outputs[0]]), ir.node("Mul", [x, cast.outputs[0]])]
    for node in (one, cast, add, *products):
        node.outputs[0].dtype = ir.DataType.FLOAT
    graph = ir.Graph([x], [p.outputs[0] for p in products], nodes=[one, cast, add, *products], initializers=[weight])
    return ir.Model(graph, ir_version=10)


def test_sums_and_casts_of_a_weight_are_constants_of_its_layer():
    small = {f"layers.{layer}.norm.weight": np.arange(3).astype(np.float16) / 3 + layer for layer in range(4)}
    model = norm_graph(small[WEIGHT])
    derived = fold_derived(model, small)
    assert [each.name for each in derived] == [f"{WEIGHT}.Cast", f"{WEIGHT}.Cast.Add"]
    assert [node.op_type for node in model.graph] == ["Constant", "Mul", "Mul"]
    found = model.graph.initializers[f"{WEIGHT}.Cast.Add"].const_value.numpy()
    np.testing.assert_array_equal(found, 1 + small[WEIGHT].astype(np.float32))
    others = derived_of_all(derived, small, Stack("layers", 4))
    assert len(others) == 8
    np.testing.assert_array_equal(
        others["layers.3.norm.weight.Cast.Add"], 1 + small["layers.3.norm.weight"].astype("f4")
    )


def test_what_is_not_bound_or_a_product_with_an_input_stays():
    model = norm_graph(np.ones(3, np.float16))
    assert fold_derived(model, {}) == () and len(model.graph) == 5
