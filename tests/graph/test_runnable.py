"""A graph that computes in bfloat16 is refused for the CPU, with its operator."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from lora_export.errors import InputRefused
from lora_export.graph.runnable import refuse_bfloat16


def graph(*, multiplies: bool) -> ir.Model:
    x = ir.Value(name="x", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
    cast = ir.node("Cast", [x], attributes={"to": int(ir.DataType.BFLOAT16)})
    scopes = {"pkg.torch.onnx.name_scopes": "['', 'transformer', 'mul']"}
    product = ir.node("Mul", [cast.outputs[0], cast.outputs[0]], metadata_props=scopes)
    nodes = [cast, product] if multiplies else [cast]
    for node in nodes:
        node.outputs[0].dtype = ir.DataType.BFLOAT16
    back = ir.node("Cast", [nodes[-1].outputs[0]], attributes={"to": int(ir.DataType.FLOAT)})
    back.outputs[0].dtype = ir.DataType.FLOAT
    return ir.Model(ir.Graph([x], back.outputs, nodes=[*nodes, back], opset_imports={"": 20}), ir_version=10)


def test_products_of_bfloat16_are_refused_for_the_cpu():
    with pytest.raises(InputRefused, match="The model's own code computes in bfloat16") as refused:
        refuse_bfloat16(graph(multiplies=True), "cpu")
    assert refused.value.where == "Mul in transformer"
    refuse_bfloat16(graph(multiplies=True), "cuda")


def test_casts_alone_are_run():
    refuse_bfloat16(graph(multiplies=False), "cpu")
