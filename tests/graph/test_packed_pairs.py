"""Modules that share an input share a pair: which, in what form, and at how many nodes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import transformers

from lora_export.artifact import read_manifest
from lora_export.base.tasks import Task
from lora_export.base.trace import trace
from lora_export.base.weightless import build_weightless
from lora_export.graph.adapter_inputs import add_adapter_inputs
from lora_export.graph.fuse import fuse
from lora_export.graph.module_values import WrittenGraph
from lora_export.graph.unbound import load_weightless, save_weightless
from lora_export.packed import PackedPart
from lora_export.runtime.adapter_session import AdapterSession
from lora_export.runtime.session import open_session
from lora_export.site_choice import SiteChoice

SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
Q, K, V, OUT = (f"model.layers.0.self_attn.{name}_proj" for name in "qkvo")
GATE, UP, DOWN = (f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down"))
QKV, GATE_UP = "model.layers.0.self_attn.q_proj+k_proj+v_proj", "model.layers.0.mlp.gate_proj+up_proj"


@pytest.fixture(scope="module")
def traced(tmp_path_factory) -> Path:
    """A trace of a Qwen2, whose queries, keys and values have biases."""
    path = tmp_path_factory.mktemp("traced") / "model.onnx"
    model = build_weightless(Task.TEXT_GENERATION, transformers.Qwen2Config(**SIZES), "float16")
    save_weightless(trace(Task.TEXT_GENERATION, model), path)
    return path


def graph_with(traced: Path, choice: SiteChoice, *, packs: bool = True):
    model, entries = add_adapter_inputs(load_weightless(traced), choice, packs_siblings=packs)
    return fuse(model, "cuda", longest=(64,)), entries


def added(traced: Path, modules: tuple[str, ...], *, packs: bool = True) -> Counter:
    """The operators that pairs on `modules` add to the graph."""
    base, _ = graph_with(traced, SiteChoice())
    model, _ = graph_with(traced, SiteChoice(lora_modules=modules), packs=packs)
    found = Counter(node.op_type for node in model.graph)
    found.subtract(Counter(node.op_type for node in base.graph))
    return Counter({op: n for op, n in found.items() if n and op != "Constant"})


@pytest.mark.parametrize(
    ("modules", "groups"),
    [((Q, K, V, OUT, GATE, UP, DOWN), 4), ((Q, V), 1), ((V, Q, K), 1), ((GATE,), 1), ((OUT, DOWN), 2)],
    ids=["all", "queries and values", "in another order", "one of two", "alone"],
)
def test_a_group_costs_two_products_and_a_sum(traced, modules, groups):
    assert added(traced, modules) == {"MatMul": 2 * groups, "Add": groups}


def test_unpacked_they_cost_more(traced):
    assert added(traced, (Q, K, V), packs=False) == {"MatMul": 6, "Concat": 1, "Add": 1}


def test_the_inputs_say_whose_they_are(traced):
    _, entries = graph_with(traced, SiteChoice(lora_modules=(V, Q, GATE, DOWN)))
    assert [(each.name, each.dims[1:]) for each in entries] == [
        (f"{QKV}.lora_A.weight", (64, f"{QKV}.rank")),
        (f"{QKV}.lora_B.weight", (f"{QKV}.rank", 128)),
        (f"{GATE_UP}.lora_A.weight", (64, f"{GATE_UP}.rank")),
        (f"{GATE_UP}.lora_B.weight", (f"{GATE_UP}.rank", 96)),
        (f"{DOWN}.lora_A.weight", (48, f"{DOWN}.rank")),
        (f"{DOWN}.lora_B.weight", (f"{DOWN}.rank", 64)),
    ]
    assert entries[0].parts == entries[1].parts == (PackedPart(Q, 64), PackedPart(K, 32), PackedPart(V, 32))
    assert entries[0].modules == (Q, K, V) and entries[-1].modules == (DOWN,) and not entries[-1].parts


@pytest.mark.parametrize("what", ["gain_modules", "replaced_modules", "bias_modules"])
def test_a_module_with_more_than_a_pair_keeps_its_own(traced, what):
    pairs = (Q, V) if what == "replaced_modules" else (Q, K, V)
    _, entries = graph_with(traced, SiteChoice(lora_modules=pairs, **{what: (K,)}))
    assert {each.module for each in entries} == {"model.layers.0.self_attn.q_proj+v_proj", K}


def test_a_gate_opens_for_the_modules_of_a_group_together(traced):
    choice = SiteChoice(lora_modules=(Q, K, GATE, UP), gate_modules=(Q, K, GATE))
    _, entries = graph_with(traced, choice)
    assert {each.module for each in entries} == {QKV, GATE, UP, ""}


def test_a_module_is_in_one_group_where_gates_differ(traced):
    """Keys, which no adapter touches, come along with neither queries nor values."""
    _, entries = graph_with(traced, SiteChoice(lora_modules=(Q, V), gate_modules=(Q,)))
    assert {each.module for each in entries} == {Q, V, ""}


def projections(*, n_key_calls: int) -> ir.Model:
    """Three products of one value, the keys' weight also by another value: as DeBERTa's by its table of positions."""

    def value(name: str, dims: list) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(ir.DataType.FLOAT))

    x, other = value("x", ["batch", "n", 8]), value("other", ["batch", "m", 8])
    weights = {name: value(f"layer.{name}.weight", [8, 8]) for name in ("q", "k", "v")}
    calls = [("q", x), ("k", x), ("v", x), *[("k", other)] * (n_key_calls - 1)]
    nodes = []
    for module, given in calls:
        scopes = {"pkg.torch.onnx.name_scopes": repr(["", f"layer.{module}", ""])}
        nodes.append(ir.node("MatMul", [given, weights[module]], metadata_props=scopes))
        nodes[-1].outputs[0].shape, nodes[-1].outputs[0].dtype = given.shape, ir.DataType.FLOAT
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph(
        [x, other], outputs, nodes=nodes, initializers=list(weights.values()), opset_imports={"": 20}, name="g"
    )
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize("chosen", [("q", "k", "v"), ("k",), ("k", "q"), ("v", "k")], ids=",".join)
@pytest.mark.parametrize("n_key_calls", [1, 2])
def test_every_chosen_module_has_one_pair_however_often_it_is_called(n_key_calls, chosen):
    choice = SiteChoice(lora_modules=tuple(f"layer.{name}" for name in chosen))
    model, entries = add_adapter_inputs(projections(n_key_calls=n_key_calls), choice, packs_siblings=True)
    served = [module for each in entries if each.name.endswith("lora_A.weight") for module in each.modules]
    assert len(served) == len(set(served)) and set(served) >= set(choice.lora_modules)
    together = {each.module for each in entries}
    assert ("layer.k" in together) is (n_key_calls == 2)
    reads = Counter(value.name for node in model.graph for value in node.inputs if "lora_A" in (value.name or ""))
    assert set(reads.values()) == ({1, 2} if n_key_calls == 2 and len(chosen) > 1 else {n_key_calls})


def test_a_manifest_keeps_the_parts(exports):
    contract = read_manifest(exports["llama-cuda"]).contract
    layer = "model.layers.1.self_attn"
    assert contract.of_module(f"{layer}.v_proj")[contract.adapter_inputs[0].kind].name == (
        f"{layer}.q_proj+k_proj+v_proj.lora_A.weight"
    )
    assert f"{layer}.k_proj" in contract.modules
    assert type(contract).from_dict(contract.to_dict()) == contract
    plain = read_manifest(exports["llama-dynamic"]).contract.to_dict()
    assert not any("parts" in entry for entry in plain["adapter_inputs"])


@pytest.mark.parametrize("name", ["llama-dynamic", "llama-f16", "llama-cuda"])
def test_no_sum_of_a_decoder_is_over_nothing(name, exports):
    """CUDA refuses a sum along an axis of no numbers, as the past of a prompt is."""
    folder = exports[name]
    model = ir.load(folder / "model.onnx")
    summed = [node.inputs[0] for node in model.graph if node.op_type.startswith("Reduce")]
    assert summed
    session = AdapterSession(folder, "cpu")
    feeds = {"input_ids": np.array([[3, 5]]), "attention_mask": np.array([[1, 1]])}
    graph = WrittenGraph(folder / "model.onnx").with_outputs(value.name for value in summed)
    session.runs = session.runs.on(open_session(graph, "cpu", weights=folder))
    found = session.run(feeds, outputs=[value.name for value in summed])
    assert all(array.size for array in found.values()), {name: array.shape for name, array in found.items()}
