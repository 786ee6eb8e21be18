"""Modules are found in a written graph: by their weights, through packing, fused biases and skip normalizations."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from lora_export.graph.module_values import WrittenGraph
from lora_export.graph.sites import NAME_SCOPES


def written(
    tmp_path, nodes: list[ir.Node], inputs: list[ir.Value], weights: dict[str, tuple[int, ...]]
) -> WrittenGraph:
    """A graph of `nodes`, whose last output is the graph's, in a file."""
    used = {value.name: value for node in nodes for value in node.inputs if value is not None}
    initializers = []
    for name, shape in weights.items():
        value = used[name]
        value.const_value = ir.tensor(np.ones(shape, np.float32), name=name)
        initializers.append(value)
    output = nodes[-1].outputs[0]
    graph = ir.Graph(inputs, [output], nodes=nodes, initializers=initializers, opset_imports={"": 20})
    path = tmp_path / "model.onnx"
    ir.save(ir.Model(graph, ir_version=10), path)
    return WrittenGraph(path)


def value(name: str) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT))


def node(op_type: str, inputs: list[ir.Value], outputs: list[str], module: str = "", domain: str = "", **attributes):
    scopes = {NAME_SCOPES: repr(["", module, "leaf"])} if module else {}
    made = [value(name) for name in outputs]
    return ir.node(op_type, inputs, attributes=attributes, outputs=made, metadata_props=scopes, domain=domain)


def test_the_output_is_where_the_chain_of_a_modules_nodes_ends(tmp_path):
    x, a, b = value("x"), value("m.lora_A.weight"), value("m.lora_B.weight")
    product = node("MatMul", [x, value("m.weight")], ["wx"])
    low = node("MatMul", [x, a], ["xa"])
    delta = node("MatMul", [low.outputs[0], b], ["xab"])
    added = node("Add", [product.outputs[0], delta.outputs[0]], ["sum"], "m")
    bias = node("Add", [added.outputs[0], value("m.bias")], ["y"])
    other = node("Add", [bias.outputs[0], x], ["residual"], "parent")
    graph = written(
        tmp_path, [product, low, delta, added, bias, other], [x, a, b], {"m.weight": (4, 4), "m.bias": (4,)}
    )
    (site,) = graph.sites()
    assert (site.module, site.input, site.output) == ("m", "x", "y")
    assert site.parts == {"base": "wx", "lora_A": "xa", "lora_B": "xab"}
    assert not (site.bias_is_pending or site.base_has_bias) and site.addend is None and site.scale == 1


def test_packed_projections_have_a_part_of_the_split_each(tmp_path):
    x, packed, sizes = value("x"), value("a.weight+b.weight"), value("sizes")
    product = node("MatMul", [x, packed], ["both"])
    split = node("Split", [product.outputs[0], sizes], ["ya", "yb"], axis=-1)
    end = node("Mul", [split.outputs[0], split.outputs[1]], ["end"], "parent")
    graph = written(tmp_path, [product, split, end], [x], {"a.weight+b.weight": (4, 8), "sizes": (2,)})
    assert [(site.module, site.input, site.output) for site in graph.sites()] == [("a", "x", "ya"), ("b", "x", "yb")]


def test_a_bias_in_a_fused_operator_is_pending(tmp_path):
    x = value("x")
    product = node("MatMul", [x, value("m.weight")], ["wx"], "m")
    gelu = node("BiasGelu", [product.outputs[0], value("m.bias")], ["gelu"], "act", "com.microsoft")
    graph = written(tmp_path, [product, gelu], [x], {"m.weight": (4, 4), "m.bias": (4,)})
    site = next(site for site in graph.sites() if site.module == "m")
    assert (site.output, site.bias_is_pending) == ("wx", True)


@pytest.mark.parametrize("has_sum", [True, False])
def test_a_pair_added_by_a_skip_normalization(has_sum, tmp_path):
    x, a, b = value("x"), value("m.lora_A.weight"), value("m.lora_B.weight")
    product = node("MatMul", [x, value("m.weight")], ["wx"], "m")
    low = node("MatMul", [x, a], ["xa"], "m")
    delta = node("MatMul", [low.outputs[0], b], ["xab"], "m")
    outputs = ["normed", "", "", "total"] if has_sum else ["normed"]
    inputs = [product.outputs[0], delta.outputs[0], value("norm.weight")]
    skip = node("SkipSimplifiedLayerNormalization", inputs, outputs, "norm", "com.microsoft")
    graph = written(tmp_path, [product, low, delta, skip], [x, a, b], {"m.weight": (4, 4), "norm.weight": (4,)})
    sites = {site.module: site for site in graph.sites()}
    assert (sites["m"].output, sites["m"].addend) == (("total", None) if has_sum else ("wx", "xab"))
    assert sites["norm"].output == "normed" and sites["norm"].input == ("total" if has_sum else None)


def test_a_tied_weight_is_told_apart_by_what_reads_it(tmp_path):
    ids, x = ir.Value(name="ids", type=ir.TensorType(ir.DataType.INT64)), value("x")
    table = value("embed.weight")
    lookup = node("Gather", [table, ids], ["e"])
    total = node("Add", [lookup.outputs[0], x], ["h"], "parent")
    head = node("FusedMatMul", [total.outputs[0], table], ["logits"], domain="com.microsoft", transB=1, alpha=0.5)
    graph = written(tmp_path, [lookup, total, head], [ids, x], {"embed.weight": (9, 4)})
    first, second = (site for site in graph.sites() if site.named)
    assert (first.is_lookup, first.output) == (True, "e") and (second.is_lookup, second.output) == (False, "logits")
    assert second.scale == 0.5 and second.module == "embed"  # which module has the same weight is PyTorch's to say


def test_an_unfused_norm_ends_where_its_path_does(tmp_path):
    x = value("x")
    squared = node("Mul", [x, x], ["xx"], "norm")
    scaled = node("Mul", [squared.outputs[0], value("folded")], ["y"], "norm")
    used = node("Add", [scaled.outputs[0], x], ["h"], "parent")
    graph = written(tmp_path, [squared, scaled, used], [x], {"folded": (4,)})
    assert [(site.module, site.output) for site in graph.sites() if site.module == "norm"] == [("norm", "y")]


def test_more_outputs_leave_the_graph_as_it_was(exports):
    import onnx

    graph = WrittenGraph(exports["llama-dynamic"] / "model.onnx")
    wanted = [site.output for site in graph.sites()]
    model = onnx.load_from_string(graph.with_outputs([*wanted, "logits", "no such value"]))
    assert [output.name for output in model.graph.output] == [*graph.outputs, *(v for v in wanted if v != "logits")]
    again = onnx.load_from_string(graph.with_outputs([]))
    assert [output.name for output in again.graph.output] == list(graph.outputs)
    external = [entry for entry in again.graph.initializer if entry.external_data]
    assert external and not any(entry.raw_data for entry in external)
