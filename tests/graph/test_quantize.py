"""Quantized graphs hold what ONNX Runtime's own quantizer makes of the graph of floats, and compute its product."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from catalogue import EXPORTS, INT4, export_to
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    HQQWeightOnlyQuantConfig,
    KQuantWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
)

from lora_export.artifact import read_manifest
from lora_export.base.recipe import Part, Quantized, Recipe
from lora_export.export.integers import Maker, dequantized, quantized
from lora_export.graph.bind import write_graphs
from lora_export.graph.quantize import quantize_weights
from lora_export.graph.stored_integers import stored_integers
from lora_export.graph.unbound import set_recipe
from lora_export.quantization import Method, Quantization, requested_of


def value(name: str, dims: list) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(ir.DataType.FLOAT))


def unbound_weight(graph: ir.Graph, name: str, dims: list) -> ir.Value:
    weight = value(name, dims)
    set_recipe(weight, Recipe((name,)))
    graph.initializers[name] = weight
    return weight


def integers_of(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """The operands of its quantized products, by name."""
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    return {name: arrays[name] for node in nodes for name in node.input[1:4] if name}


# As K-quant names what it writes.
K_QUANT_NAMES = {"_Q4G32": "_Q4", "_scale": "_scales", "_zp": "_zero_points"}


def alone(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` (changed in place) with a product for each projection that it has packed, and no input that nothing
    reads, which K-quant does not take."""
    weights, nodes = {tensor.name: tensor for tensor in model.graph.initializer}, []
    for node in model.graph.node:
        if node.op_type != "MatMul" or "+" not in node.input[1]:
            nodes.append(node)
            continue
        whole, paths = onnx.numpy_helper.to_array(weights[node.input[1]]), node.input[1].split("+")
        widths = [len(whole) // (1 if "q_proj" in path else 2) for path in paths]  # half as many heads of keys
        parts = np.split(whole, np.cumsum(widths)[:-1], axis=1)
        model.graph.initializer.extend(
            onnx.numpy_helper.from_array(np.ascontiguousarray(part), path)
            for path, part in zip(paths, parts, strict=True)
        )
        nodes += [onnx.helper.make_node("MatMul", [node.input[0], path], [f"{path}.out"], path) for path in paths]
        nodes.append(
            onnx.helper.make_node("Concat", [f"{path}.out" for path in paths], node.output, node.name, axis=-1)
        )
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input}
    for value in [value for value in model.graph.input if value.name not in read]:
        model.graph.input.remove(value)
    return model


def onnx_runtimes(model: onnx.ModelProto, how: Quantization) -> dict[str, np.ndarray]:
    """The operands of quantized products that ONNX Runtime's quantizer makes of a whole graph of floats, by name."""
    match how.method:
        case Method.K_QUANT:
            config = KQuantWeightOnlyQuantConfig()
        case Method.HQQ:
            config = HQQWeightOnlyQuantConfig(how.block_size, how.bits)
        case _:
            config = DefaultWeightOnlyQuantConfig(how.block_size, how.symmetric, how.accuracy_level, bits=how.bits)
    shapes = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    odd = [node.name for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in shapes
           and -(-shapes[node.input[1]][0] // how.block_size) % 2]  # fmt: skip
    # Of an odd number of blocks, K-quant packs a row's zeros into the next one's, and then cannot shape them.
    left = odd if how.method is Method.K_QUANT else []
    quantizer = MatMulNBitsQuantizer(model, block_size=how.block_size, algo_config=config, nodes_to_exclude=left)
    quantizer.process()
    found = integers_of(quantizer.model.model)
    if how.method is not Method.K_QUANT:
        return found
    return {name.removesuffix(end) + K_QUANT_NAMES[end]: array for name, array in found.items()
            for end in K_QUANT_NAMES if name.endswith(end)}  # fmt: skip


def _packed(apart: dict[str, np.ndarray], key: str) -> np.ndarray:
    """The operand of a product of several projections, from those of each."""
    *others, last = key.split("+")
    path, _, part = last.partition(".weight")
    return np.concatenate([apart[f"{name}{part}"] for name in (*others, f"{path}.weight")])


@pytest.mark.parametrize(
    ("name", "floats"),
    [("llama-int4-merged", "llama-merged"), ("gpt2-int8-merged", "gpt2-merged"), ("llama-k-quant", "llama-base"),
     ("llama-hqq-merged", "llama-merged")],
)  # fmt: skip
def test_the_integers_are_those_of_onnx_runtimes_quantizer(name, floats, exports):
    how = read_manifest(exports[name]).quantization
    theirs = onnx_runtimes(alone(onnx.load(exports[floats] / "model.onnx")), how)
    ours = integers_of(onnx.load(exports[name] / "model.onnx"))
    if "gpt2" in name:  # ONNX Runtime's leaves a Gemm and a tied head as they are
        theirs |= {key: array for key, array in ours.items() if key not in theirs}
    left = ("lm_head.", *(("down_proj",) if how.method is Method.K_QUANT else ()))
    theirs |= {key: array for key, array in ours.items() if any(part in key for part in left)}
    theirs |= {key: _packed(theirs, key) for key in ours if "+" in key}
    assert theirs.keys() >= ours.keys() and len(ours) > 8
    for key, array in ours.items():
        expected = theirs[key].reshape(array.shape)  # HQQ's scales and zeros have one axis
        assert array.dtype == expected.dtype and np.array_equal(array, expected), key


def test_an_export_says_which_weights_it_stores_so_and_is_the_same_twice(exports, bases, adapters, tmp_path):
    manifest = read_manifest(exports["llama-int4"])
    stored = manifest.quantization
    layers = [f"model.layers.{n}." for n in range(2)]
    parts = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    assert set(stored.weights) == {f"{layer}{part}_proj.weight" for layer in layers for part in parts} | {
        "lm_head.weight"
    }
    assert requested_of(stored) == INT4 and stored.quantizer == f"onnxruntime {ort.__version__}"
    again = export_to(tmp_path / "again", EXPORTS["llama-int4"], bases, adapters)
    assert again.files == manifest.files
    data = exports["llama-int4"] / "model.onnx.data", exports["llama-dynamic"] / "model.onnx.data"
    sizes = [file.stat().st_size for file in data]
    assert sizes[0] < 0.75 * sizes[1]


@pytest.mark.parametrize(
    ("bits", "choice"),
    [*((bits, {"symmetric": symmetric}) for bits in (4, 8) for symmetric in (True, False)),
     (4, {"method": Method.K_QUANT}), (8, {"method": Method.K_QUANT}), (4, {"method": Method.HQQ})],
)  # fmt: skip
def test_every_form_of_a_linear_map_computes_the_product(bits, choice, tmp_path):
    """A product, a Gemm with a bias `[out, in]`, a head that an embedding is read from; 70 inputs in blocks of 32."""
    n_in, how = 70, Quantization(bits=bits, **choice, accuracy_level=0, keep=("kept",))
    x = value("x", ["batch", n_in])
    ids = ir.Value(name="ids", shape=ir.Shape(["n"]), type=ir.TensorType(ir.DataType.INT64))
    graph = ir.Graph([x, ids], [], nodes=[], opset_imports={"": 20, "com.microsoft": 1}, name="g")
    shapes = {"a.weight": [n_in, 6], "b.weight": [5, n_in], "c.weight": [7, n_in], "kept.weight": [n_in, 3]}
    weights = {name: unbound_weight(graph, name, dims) for name, dims in shapes.items()}
    bias = ir.Value(name="bias", const_value=ir.tensor(np.arange(5, dtype=np.float32)), shape=ir.Shape([5]))
    graph.register_initializer(bias)
    head = {"pkg.torch.onnx.name_scopes": "['', 'head', 'linear']"}
    nodes = [
        ir.node("MatMul", [x, weights["a.weight"]]),
        ir.node("Gemm", [x, weights["b.weight"], bias], attributes={"transB": 1}),
        ir.node("FusedMatMul", [x, weights["c.weight"]], attributes={"transB": 1}, domain="com.microsoft",
                metadata_props=head),
        ir.node("Gather", [weights["c.weight"], ids]),
        ir.node("MatMul", [x, weights["kept.weight"]]),
    ]  # fmt: skip
    graph.extend(nodes)
    for index, node in enumerate(nodes):
        node.outputs[0].name, node.outputs[0].dtype = f"y{index}", ir.DataType.FLOAT
        graph.outputs.append(node.outputs[0])
    model = ir.Model(graph, ir_version=10)
    assert quantize_weights(model, how, how.grid_of) == ("a.weight", "b.weight", "head.weight")
    rng = np.random.default_rng(bits)
    arrays = {name: rng.standard_normal(dims).astype(np.float32) for name, dims in shapes.items()}

    class Arrays:
        def make_weight(self, recipe: Recipe, dtype: str) -> np.ndarray:
            array = arrays[recipe.parameters[0]]
            return np.ascontiguousarray(array.T if recipe.transposed else array)

    write_graphs({"model": model}, tmp_path, Maker(Arrays()), adapter_inputs={"model": ()})
    fed = {"x": rng.standard_normal((4, n_in)).astype(np.float32), "ids": np.array([3, 0])}
    path = tmp_path / "model.onnx"
    found = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, fed)
    read = {stored.parameters[0]: stored.values for stored in stored_integers(path)}
    floats = {"a.weight": arrays["a.weight"].T, "b.weight": arrays["b.weight"], "head.weight": arrays["c.weight"]}
    assert read.keys() == floats.keys()
    for name, stored in read.items():
        whole = Quantized.of(how, Part.INTEGERS, "float32")
        parts = quantized(np.ascontiguousarray(floats[name].T), whole)
        # The reader rounds once; where zeros are floats, ONNX Runtime and `dequantized` round twice.
        np.testing.assert_allclose(stored, dequantized(parts, whole, n_in).T, rtol=3e-7 * how.has_float_zeros)
        assert 0 < np.abs(stored - floats[name]).max() < (0.5 if bits == 4 else 0.04)
    expected = [fed["x"] @ read["a.weight"].T, fed["x"] @ read["b.weight"].T + np.arange(5),
                fed["x"] @ read["head.weight"].T, arrays["c.weight"][fed["ids"]], fed["x"] @ arrays["kept.weight"]]  # fmt: skip
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_a_float_weight_that_is_read_otherwise_stays_one():
    """An adapter input's default, a product of two axes too many, and a Gemm with a factor."""
    x = value("x", ["batch", 32])
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 20}, name="g")
    given = unbound_weight(graph, "given.weight", [32, 4])
    graph.inputs.append(given)
    experts, scaled = unbound_weight(graph, "experts", [2, 32, 4]), unbound_weight(graph, "scaled.weight", [32, 4])
    graph.extend(
        [ir.node("MatMul", [x, given]), ir.node("MatMul", [x, experts]),
         ir.node("Gemm", [x, scaled], attributes={"alpha": 0.5})]
    )  # fmt: skip
    graph.outputs.extend(node.outputs[0] for node in graph)
    model = ir.Model(graph, ir_version=10)
    assert quantize_weights(model, Quantization(), Quantization().grid_of) == ()
    assert [node.op_type for node in model.graph] == ["MatMul", "MatMul", "Gemm"]
