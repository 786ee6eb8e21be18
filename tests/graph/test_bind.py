"""Writing: aligned tensors, exact hashes, one weight at a time."""

from __future__ import annotations

import hashlib
import weakref

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from lora_export.artifact import read_manifest
from lora_export.base.recipe import Recipe
from lora_export.contract import AdapterInputKind
from lora_export.errors import InputRefused
from lora_export.graph.bind import write_graphs
from lora_export.graph.unbound import set_recipe

N = 600  # a square float32 weight of over a megabyte


def chain(n_weights: int) -> ir.Model:
    """x · w0 · w1 · … with every weight unbound."""
    x = ir.Value(name="x", shape=ir.Shape(["batch", N]), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 20}, name="chain")
    value = x
    for index in range(n_weights):
        weight = ir.Value(name=f"w{index}", shape=ir.Shape([N, N]), type=ir.TensorType(ir.DataType.FLOAT))
        set_recipe(weight, Recipe((f"p{index}",)))
        graph.initializers[weight.name] = weight
        node = ir.node("MatMul", [value, weight])
        graph.append(node)
        value = node.outputs[0]
    value.name, value.shape, value.dtype = "y", x.shape, ir.DataType.FLOAT
    graph.outputs.append(value)
    return ir.Model(graph, ir_version=10)


def test_weights_are_made_one_at_a_time(tmp_path):
    alive: list[weakref.ref] = []
    most = 0

    def make(recipe: Recipe, dtype: str) -> np.ndarray:
        nonlocal most
        most = max(most, sum(ref() is not None for ref in alive))
        array = np.full((N, N), int(recipe.parameters[0][1:]), np.float32)
        alive.append(weakref.ref(array))
        return array

    told = []
    written = write_graphs(
        {"model": chain(8)},
        tmp_path,
        make,
        adapter_inputs={"model": ()},
        on_weight=lambda name, n: told.append((name, n)),
    )
    # One that is being hashed on the other thread may still be there.
    assert most <= 2, f"{most} weights were in memory at once"
    assert told == [(f"w{index}", 4 * N * N) for index in range(8)]
    assert written.n_bytes == sum((tmp_path / name).stat().st_size for name in written.sha256)


def test_hashes_are_those_of_the_files_and_tensors_start_on_pages(tmp_path):
    written = write_graphs(
        {"model": chain(3)}, tmp_path, lambda recipe, dtype: np.full((N, N), 3, dtype), adapter_inputs={"model": ()}
    )
    assert set(written.sha256) == {"model.onnx", "model.onnx.data"}
    for name, expected in written.sha256.items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == expected, name
    offsets = [int(e.value) for t in onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.initializer
               for e in t.external_data if e.key == "offset"]  # fmt: skip
    assert len(offsets) == 3 and all(offset % 4096 == 0 for offset in offsets)


def test_a_failing_weight_stops_the_write(tmp_path):
    def fail(recipe: Recipe, dtype: str) -> np.ndarray:
        raise OSError(28, "no room")

    with pytest.raises(OSError, match="no room"):
        write_graphs({"model": chain(2)}, tmp_path, fail, adapter_inputs={"model": ()})


@pytest.mark.parametrize(("shape", "dtype"), [((N, N), np.float16), ((N, N + 1), np.float32), ((N,), np.float32)])
def test_a_weight_that_is_not_dtype_times_shape_is_refused(shape, dtype, tmp_path):
    with pytest.raises(InputRefused, match="not of the size that the graph has for it") as refused:
        write_graphs(
            {"model": chain(1)}, tmp_path, lambda recipe, _: np.zeros(shape, dtype), adapter_inputs={"model": ()}
        )
    assert (refused.value.where, refused.value.expected) == ("w0", f"[{N}, {N}] in float32, {4 * N * N} bytes")
    assert f"{list(shape)} in {np.dtype(dtype)}" in refused.value.found


def test_graphs_of_one_data_file_share_what_is_made_the_same_way(tmp_path):
    made = []

    def make(recipe: Recipe, dtype: str) -> np.ndarray:
        made.append(recipe.parameters[0])
        return np.full((N, N), len(made), dtype)

    models = {"encoder_model": chain(1), "decoder_model": chain(3), "decoder_with_past_model": chain(2)}
    written = write_graphs(models, tmp_path, make, adapter_inputs=dict.fromkeys(models, ()))
    data = {"encoder_model.onnx.data", "decoder_model.onnx.data"}
    assert set(written.sha256) == {f"{graph}.onnx" for graph in models} | data
    # The encoder's file is its own; in the decoder's, each weight is once.
    assert made == ["p0", "p0", "p1", "p2"]
    for graph, first in (("encoder_model", 1), ("decoder_model", 2), ("decoder_with_past_model", 2)):
        weights = ir.load(tmp_path / f"{graph}.onnx").graph.initializers
        assert [float(w.const_value.numpy()[0, 0]) for w in weights.values()] == [
            first + i for i in range(len(weights))
        ]


# ONNX's checker does not know ONNX Runtime's SimplifiedLayerNormalization, which the Llamas have.
@pytest.mark.parametrize("name", ["bert-dynamic", "gpt2-dynamic", "gpt2-merged", "vit-dynamic"])
def test_exports_pass_onnxs_own_checker(name, exports):
    onnx.checker.check_model(str(exports[name] / "model.onnx"))
    model = onnx.load(exports[name] / "model.onnx", load_external_data=False)
    names = [tensor.name for tensor in model.graph.initializer]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", ["llama-dynamic", "bert-dynamic", "vit-merged"])
def test_served_files_carry_no_traces_of_the_machine_that_made_them(name, exports):
    content = (exports[name] / "model.onnx").read_bytes()
    for trace in (b"/work/", b"/tmp/", b"site-packages", b"stack_trace", b".py"):
        assert trace not in content, trace


@pytest.mark.parametrize("name", ["bert-dynamic", "classifier-dynamic", "vit-dynamic", "llama-voice"])
def test_stored_defaults_lie_where_the_manifest_says(name, exports):
    manifest = read_manifest(exports[name])
    data = (exports[name] / "model.onnx.data").read_bytes()
    graph = ir.load(exports[name] / "model.onnx").graph
    heads = [e for e in manifest.contract.adapter_inputs if e.kind in (AdapterInputKind.WEIGHT, AdapterInputKind.BIAS)]
    assert heads
    for entry in heads:
        stored = entry.default
        found = np.frombuffer(data, np.float32, stored.length // 4, stored.offset).reshape(stored.shape)
        assert np.array_equal(found, graph.initializers[entry.name].const_value.numpy())
