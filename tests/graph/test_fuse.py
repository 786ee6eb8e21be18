"""Packing of sibling projections, and tied weights that are stored once."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import safetensors.torch

from lora_export.base.recipe import RECIPE, Recipe
from lora_export.graph.bind import write_graphs
from lora_export.graph.fuse import fuse, pack_siblings, read_tied_weights_transposed
from lora_export.graph.unbound import prepare_weights, recipe_of, unbound

WIDTHS = {"q": 6, "k": 4, "v": 2}


def value(name: str, dims: list) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(ir.DataType.FLOAT))


def unbound_weight(graph: ir.Graph, name: str, dims: list) -> ir.Value:
    weight = value(name, dims)
    weight.metadata_props[RECIPE] = Recipe((name,)).to_json()
    graph.initializers[name] = weight
    return weight


def projections(widths=WIDTHS) -> ir.Model:
    """q = x qᵀ, k = x kᵀ, v = x vᵀ, as a trace has them: a Transpose of each weight `[out, in]`."""
    x = value("x", ["batch", "sequence", 8])
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 20}, name="g")
    for name, width in widths.items():
        weight = unbound_weight(graph, name, [width, 8])
        transpose = ir.node("Transpose", [weight], attributes={"perm": [1, 0]})
        matmul = ir.node("MatMul", [x, transpose.outputs[0]])
        graph.extend([transpose, matmul])
        output = matmul.outputs[0]
        output.name, output.shape, output.dtype = f"y_{name}", ir.Shape(["batch", "sequence", width]), x.dtype
        graph.outputs.append(output)
    return ir.Model(graph, ir_version=10)


def run(model: ir.Model, folder, weights: dict[str, np.ndarray], feeds: dict) -> list[np.ndarray]:
    def make(recipe: Recipe, dtype: str) -> np.ndarray:
        parts = [weights[name].T if recipe.transposed else weights[name] for name in recipe.parameters]
        return np.ascontiguousarray(np.concatenate(parts, axis=recipe.axis) if len(parts) > 1 else parts[0])

    write_graphs({"model": model}, folder, make, adapter_inputs={"model": ()})
    return ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"]).run(None, feeds)


@pytest.fixture
def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal((width, 8)).astype(np.float32) for name, width in WIDTHS.items()}


def test_packed_projections_equal_separate_ones(weights, tmp_path):
    model = pack_siblings(prepare_weights(projections()))
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("MatMul") == 1 and kinds.count("Split") == 1 and "Transpose" not in kinds
    (packed, recipe), *rest = unbound(model.graph)
    assert not rest and recipe == Recipe(("q", "k", "v"), transposed=True, axis=1)
    assert list(packed.shape) == [8, 12]
    x = np.random.default_rng(1).standard_normal((2, 3, 8)).astype(np.float32)
    found = run(model, tmp_path, weights, {"x": x})
    for (name, weight), output in zip(weights.items(), found, strict=True):
        np.testing.assert_allclose(output, x @ weight.T, atol=1e-5, err_msg=name)


def test_weights_of_different_layouts_are_not_packed():
    model = prepare_weights(projections({"q": 8, "k": 8}))
    recipe = Recipe(("k",), transposed=False)
    model.graph.initializers["k"].metadata_props[RECIPE] = recipe.to_json()
    pack_siblings(model)
    assert [node.op_type for node in model.graph].count("MatMul") == 2


def test_a_weight_that_may_not_be_packed_leaves_the_others_packed():
    model = pack_siblings(prepare_weights(projections()), lambda recipe: recipe.parameters != ("k",))
    assert {recipe.parameters for _, recipe in unbound(model.graph)} == {("k",), ("q", "v")}


def test_a_weight_with_another_use_is_not_packed():
    model = prepare_weights(projections())
    extra = ir.node("Identity", [model.graph.initializers["q"]])
    model.graph.append(extra)
    pack_siblings(model)
    assert {recipe.parameters for _, recipe in unbound(model.graph)} == {("q",), ("k", "v")}


def test_a_weight_that_is_also_a_lookup_table_is_stored_once_and_read_transposed(tmp_path):
    ids = ir.Value(name="ids", shape=ir.Shape(["n"]), type=ir.TensorType(ir.DataType.INT64))
    graph = ir.Graph([ids], [], nodes=[], opset_imports={"": 20}, name="tied")
    table = unbound_weight(graph, "table", [10, 4])
    gather = ir.node("Gather", [table, ids])
    transpose = ir.node("Transpose", [table], attributes={"perm": [1, 0]})
    head = ir.node("MatMul", [gather.outputs[0], transpose.outputs[0]])
    graph.extend([gather, transpose, head])
    output = head.outputs[0]
    output.name, output.shape, output.dtype = "y", ir.Shape(["n", 10]), ir.DataType.FLOAT
    graph.outputs.append(output)
    model = read_tied_weights_transposed(prepare_weights(ir.Model(graph, ir_version=10)))
    assert recipe_of(table) == Recipe(("table",), transposed=False)
    assert "FusedMatMul" in [node.op_type for node in model.graph]
    weights = {"table": np.random.default_rng(0).standard_normal((10, 4)).astype(np.float32)}
    picked = np.array([3, 9, 0])
    found = run(model, tmp_path, weights, {"ids": picked})[0]
    np.testing.assert_allclose(found, weights["table"][picked] @ weights["table"].T, atol=1e-5)


def stored_bytes(folder) -> int:
    return (folder / "model.onnx.data").stat().st_size


@pytest.mark.parametrize(
    ("name", "packs_gate"), [("llama-cuda-base", True), ("llama-cuda", True), ("llama-base", False)]
)
def test_exported_projections_are_packed_where_it_pays(name, packs_gate, exports):
    """The attention reads its three packed; an MLP's two would be taken apart again, which pays on CUDA only."""
    names = set(ir.load(exports[name] / "model.onnx").graph.initializers)
    layer = "model.layers.0"
    assert "+".join(f"{layer}.self_attn.{part}_proj.weight" for part in "qkv") in names
    assert f"{layer}.self_attn.q_proj.weight" not in names
    assert (f"{layer}.mlp.gate_proj.weight+{layer}.mlp.up_proj.weight" in names) is packs_gate
    assert (f"{layer}.mlp.gate_proj.weight" in names) is not packs_gate


@pytest.mark.parametrize("name", ["llama-base", "llama-dynamic", "llama-sum", "llama-head", "gpt2-merged"])
def test_a_tied_weight_is_stored_once(name, exports, bases):
    base = bases[name.split("-")[0]]
    tensors = safetensors.torch.load_file(base / "model.safetensors")
    needed = sum(t.numel() * 4 for t in tensors.values())
    table = 260 * (64 if "llama" in name else 32) * 4
    padding = 4096 * (len(tensors) + 4)
    assert stored_bytes(exports[name]) < needed + padding
    graph = ir.load(exports[name] / "model.onnx").graph
    assert [v.name for v in graph.initializers.values() if v.const_value.nbytes == table].__len__() == 1


def test_an_adapter_on_a_tied_head_leaves_the_embedding_alone(exports, bases):
    """The merged head differs from the embedding, which keeps the base's numbers."""
    graph = ir.load(exports["llama-untied"] / "model.onnx").graph
    tables = [v.const_value.numpy() for v in graph.initializers.values() if sorted(v.shape) == [64, 260]]
    assert len(tables) == 2
    embedding = safetensors.torch.load_file(bases["llama"] / "model.safetensors")["model.embed_tokens.weight"].numpy()
    same = [np.array_equal(table if table.shape == (260, 64) else table.T, embedding) for table in tables]
    assert sorted(same) == [False, True]


@pytest.mark.parametrize("provider", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("op_type", "operand", "stays"),
    [("Add", 1e-8, True), ("Sub", -1e-9, True), ("Mul", 1.000005, True), ("Div", 0.999995, True),
     ("Add", 0.0, False), ("Sub", 0.0, False), ("Mul", 1.0, False), ("Div", 1.0, False)],
)  # fmt: skip
def test_only_a_zero_and_a_one_do_nothing(op_type, operand, stays, provider):
    """onnxscript takes 1e-8 for 0, and drops the epsilon of Helium's norms: NaN where a token's embedding is zero."""
    x, y = value("x", ["n", 4]), value("y", ["n", 4])
    constant = ir.Value(name="c", const_value=ir.tensor(np.array(operand, np.float32), name="c"))
    constant.dtype, constant.shape = ir.DataType.FLOAT, ir.Shape([])
    changed = ir.node(op_type, [x, constant])
    last = ir.node("Neg", [changed.outputs[0]], outputs=[y])
    graph = ir.Graph([x], [y], nodes=[changed, last], initializers=[constant], opset_imports={"": 20})
    fused = fuse(ir.Model(graph, ir_version=10), provider)
    assert [node.op_type for node in fused.graph] == ([op_type, "Neg"] if stays else ["Neg"])
