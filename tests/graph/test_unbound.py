"""Initializers without a value, and the file they are kept in."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lora_export.base.recipe import Recipe
from lora_export.contract import AdapterInput, AdapterInputKind
from lora_export.graph.adapter_inputs import attach_defaults
from lora_export.graph.unbound import (
    bind_small,
    load_weightless,
    recipe_of,
    rename_weight,
    save_weightless,
    set_recipe,
    unbound,
)


def model_with_an_adapter_input() -> tuple[ir.Model, tuple[AdapterInput, ...]]:
    def value(name: str, dims: list) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(ir.DataType.FLOAT))

    x, w, norm = value("x", ["batch", "sequence", 4]), value("w", [4, 4]), value("norm", [4])
    head = value("head.weight", ["rows", 4, "head.out_features"])
    a, b = value("w.lora_A.weight", ["rows", 4, "w.rank"]), value("w.lora_B.weight", ["rows", "w.rank", 4])
    nodes = [ir.node("MatMul", [x, w]), ir.node("MatMul", [x, a])]
    nodes.append(ir.node("MatMul", [nodes[1].outputs[0], b]))
    nodes.append(ir.node("Add", [nodes[0].outputs[0], nodes[2].outputs[0]]))
    nodes.append(ir.node("Mul", [nodes[3].outputs[0], norm]))
    nodes.append(ir.node("MatMul", [nodes[4].outputs[0], head]))
    y = nodes[-1].outputs[0]
    y.name, y.dtype = "y", ir.DataType.FLOAT
    graph = ir.Graph([x, a, b, head], [y], nodes=nodes, initializers=[w, norm], opset_imports={"": 20}, name="g")
    set_recipe(w, Recipe(("w.weight",), transposed=True))
    set_recipe(norm, Recipe(("norm.weight",)))
    entries = (
        AdapterInput(a.name, "w", AdapterInputKind.LORA_A, "float32", ("rows", 4, "w.rank")),
        AdapterInput(b.name, "w", AdapterInputKind.LORA_B, "float32", ("rows", "w.rank", 4)),
        AdapterInput(head.name, "head", AdapterInputKind.WEIGHT, "float32", ("rows", 4, "head.out_features")),
    )
    return ir.Model(graph, ir_version=10), entries


def test_a_round_trip_through_the_file_keeps_everything(tmp_path):
    model, entries = model_with_an_adapter_input()
    attach_defaults(model.graph, entries)
    before_inputs = [value.name for value in model.graph.inputs]
    before = {value.name: recipe for value, recipe in unbound(model.graph)}
    assert set(before) == {"w", "norm", "head.weight"}
    save_weightless(model, tmp_path / "g.onnx")
    for found in (model, load_weightless(tmp_path / "g.onnx")):
        assert {value.name: recipe for value, recipe in unbound(found.graph)} == before
        assert [value.name for value in found.graph.inputs] == before_inputs
        assert set(found.graph.initializers) == {"w", "norm", "head.weight", "w.lora_A.weight", "w.lora_B.weight"}
        assert [node.op_type for node in found.graph] == ["MatMul", "MatMul", "MatMul", "Add", "Mul", "MatMul"]
        rank_zero = found.graph.initializers["w.lora_A.weight"].const_value
        assert tuple(rank_zero.shape) == (1, 4, 0)
    assert (tmp_path / "g.onnx").stat().st_size < 4000


def test_small_parameters_are_bound_by_name_and_others_left():
    model, _ = model_with_an_adapter_input()
    bind_small(model, {"norm": np.arange(4, dtype=np.float32), "elsewhere": np.zeros(3, np.float32)})
    assert [value.name for value, _ in unbound(model.graph)] == ["w"]
    assert model.graph.initializers["norm"].const_value.numpy().tolist() == [0, 1, 2, 3]
    assert recipe_of(model.graph.initializers["norm"]) is None


def test_a_recipe_survives_json():
    recipe = Recipe(("a.weight", "b.weight"), transposed=True, axis=1)
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_a_tied_weight_goes_by_its_other_name():
    model, _ = model_with_an_adapter_input()
    weight = model.graph.initializers["w"]
    rename_weight(model, "w", "embedding.weight")
    assert model.graph.initializers["embedding.weight"] is weight and "w" not in model.graph.initializers
    assert recipe_of(weight) == Recipe(("embedding.weight",))
    before = dict(model.graph.initializers)
    rename_weight(model, "absent", "other")
    assert dict(model.graph.initializers) == before
