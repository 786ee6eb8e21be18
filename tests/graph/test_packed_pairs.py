"""Modules that share an input share a pair: which, in what form, and at how many nodes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx_ir as ir
import pytest
import transformers

from lora_export.artifact import read_manifest
from lora_export.base.tasks import Task
from lora_export.base.trace import trace
from lora_export.base.weightless import build_weightless
from lora_export.graph.adapter_inputs import add_adapter_inputs
from lora_export.graph.fuse import fuse
from lora_export.graph.unbound import load_weightless, save_weightless
from lora_export.packed import PackedPart
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


def test_no_sum_of_a_decoder_for_cuda_is_over_nothing(exports):
    """CUDA refuses a sum along an axis of no numbers, as the past of a prompt is."""
    graph = ir.load(exports["llama-cuda"] / "model.onnx").graph
    sums = [node for node in graph if node.op_type.startswith("Reduce")]
    assert all(node.inputs[0].producer().op_type != "Slice" for node in sums)
