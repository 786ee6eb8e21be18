"""A graph stamped out of one layer is the graph of the whole model."""

from __future__ import annotations

import ast
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from architectures import CATALOGUE, make_base
from more_architectures import MORE
from peft import LoraConfig, get_peft_model

from lora_export.base.layers import Stack, alike_stacks, deep_paths, shortened
from lora_export.base.recipe import RECIPE
from lora_export.base.tasks import Task
from lora_export.base.weightless import build_weightless
from lora_export.export import graphs
from lora_export.export.plan import Request
from lora_export.graph.derived import Derived
from lora_export.graph.layer_names import LayerNames, derived_of_all, expanded, is_uniform, stand_ins
from lora_export.graph.sites import NAME_SCOPES
from lora_export.pipeline import ExportOptions, export
from lora_export.site_choice import SiteChoice

N_LAYERS = 6
# With `--whole-matrix`: of kinds that take turns, two of each and what stands before and after are more than six.
N_MANY = 12
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
SIZES["num_hidden_layers"] = N_LAYERS
LLAMA = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, architectures=["LlamaForCausalLM"])
TRACED_WHOLE = "The base's layers could not be copied from one another, so all are traced, which takes longer."
# One layer that is run several times; sinks of attention, which are folded to constants of no layer.
WHOLE = ("ALBERT", "GPT-OSS")
# Of the kinds whose projections are fused in another way, and of two stacks; all with `pytest --whole-matrix`.
FEW = ("GPT-2", "CLIP")
ALL = {name: entry for name, entry in (CATALOGUE | MORE).items() if entry.refused is None}
_NUMBERS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers")


def computed(model: ir.Model) -> list[tuple]:
    """What each output is computed by, down to named inputs and weights with their recipes; constants by their bytes.

    Of which layer's cache a length is read is one, for all are of one length; so is the order of a sum's operands.
    """
    known: dict[ir.Value, int] = {}

    def of(value: ir.Value | None) -> int:
        if value is None:
            return 0
        if value not in known:
            node = value.producer()
            if node is None:
                constant = value.const_value if not value.is_graph_input() else None
                what = (value.name,) if constant is None or constant.nbytes > 4000 else (constant.tobytes(),)
                known[value] = hash((*what, value.metadata_props.get(RECIPE)))
            else:
                attributes = sorted((name, described(each)) for name, each in node.attributes.items())
                operands = tuple(map(of, node.inputs))
                operands = tuple(sorted(operands)) if node.op_type in ("Add", "Mul") else operands
                if node.op_type == "Shape" and node.inputs[0].name.startswith("past_key_values."):
                    operands = ("a cache",)
                known[value] = hash((node.op_type, node.domain, tuple(attributes), operands, node.outputs.index(value)))
        return known[value]

    def described(attribute: ir.Attr) -> str:
        return str(attribute.value.tobytes() if attribute.type == ir.AttributeType.TENSOR else attribute.value)

    for node in model.graph:  # in order, so that no recursion is deep
        for output in node.outputs:
            of(output)
    return [(value.name, of(value)) for value in model.graph.outputs]


def test_a_graph_for_cuda_is_stamped_as_the_whole_models(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(LLAMA)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(tmp_path / "base")
    options = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(model, options).save_pretrained(tmp_path / "adapter")
    given = (str(tmp_path / "base"), ((str(tmp_path / "adapter"), "a"),))
    request = Request(*given, "dynamic", "text-generation", "float32", "cuda")
    said, whole_said = require_same(request, tmp_path, monkeypatch)
    assert (said, whole_said) == ([], [TRACED_WHOLE]), "the layers are copied"


def require_same(request: Request, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[str]]:
    """The remarks of an export with copied layers and of one that traces all; both have the same graphs."""
    made, original = [], graphs._reattached

    def keep(model: ir.Model, resolved):
        made.append((computed(model), modules_of_nodes(model)))
        return original(model, resolved)

    monkeypatch.setattr(graphs, "_reattached", keep)
    said, whole_said = [], []
    stamped_out = export(request, ExportOptions(folder / "stamped", use_cache=False), remark=said.append)
    monkeypatch.setattr(graphs, "alike_stacks", lambda model: ())
    whole = export(request, ExportOptions(folder / "whole", use_cache=False), remark=whole_said.append)
    n_graphs = len(whole.graphs)
    assert len(made) == 2 * n_graphs and made[:n_graphs] == made[n_graphs:]
    assert stamped_out.graphs.keys() == whole.graphs.keys()
    for name, contract in whole.graphs.items():
        found = stamped_out.graphs[name]
        assert (found.inputs, found.outputs) == (contract.inputs, contract.outputs)
        assert [each.name for each in found.adapter_inputs] == [each.name for each in contract.adapter_inputs]
    return said, whole_said


def modules_of_nodes(model: ir.Model) -> Counter:
    """How many nodes of each operator say that they are of each module, by which `check` finds a module's output."""
    scopes = [(node.op_type, node.metadata_props.get(NAME_SCOPES)) for node in model.graph.all_nodes()]
    return Counter((kind, text and ast.literal_eval(text)[-2]) for kind, text in scopes if kind != "Constant")


def deepened(fields: dict, n_layers: int = N_LAYERS) -> dict:
    """A config's `fields` with `n_layers` layers."""
    found = {name: deepened(value, n_layers) if isinstance(value, dict) else value for name, value in fields.items()}
    found |= {name: n_layers for name in _NUMBERS if name in fields}
    if "layer_types" in fields:
        found["layer_types"] = list(fields["layer_types"]) * (n_layers // len(fields["layer_types"]))
    if "attention_types" in fields:  # GPT-Neo's
        found["attention_types"] = [[kinds, n_layers // len(kinds)] for kinds, _ in fields["attention_types"]]
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "architecture" in metafunc.fixturenames:
        whole = metafunc.config.getoption("--whole-matrix")
        chosen = [(name, N_MANY) for name in ALL] if whole else [(name, N_LAYERS) for name in FEW]
        metafunc.parametrize(("architecture", "n_layers"), chosen)


def test_every_architecture_is_stamped_as_it_is_traced_or_says_that_it_is_not(
    architecture, n_layers, tmp_path, monkeypatch
):
    """With one adapter on the architecture's usual targets; see ci/benchmarks/architectures.py."""
    entry = ALL[architecture]
    entry = replace(entry, fields=deepened(entry.fields, n_layers))
    base = make_base(entry, tmp_path / "base")
    model = getattr(transformers, entry.auto).from_pretrained(base)
    with torch.no_grad():  # norms and biases as they start are equal, and one is kept of equal constants
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(1, 0.3)
    model.save_pretrained(base)
    options = LoraConfig(r=2, target_modules=entry.targets, task_type=entry.task_type, init_lora_weights=False)
    get_peft_model(model, options).save_pretrained(tmp_path / "adapter")
    request = Request(str(base), ((str(tmp_path / "adapter"), "a"),), "dynamic", entry.task, "float32", "cpu")
    said, _ = require_same(request, tmp_path, monkeypatch)
    assert [text for text in said if "traced" in text] == ([TRACED_WHOLE] if architecture in WHOLE else [])


# Windows in every layer but each sixth, second or third; in half of them; the first ones dense; stacks of other depths.
SIXTH = {"layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 4 + ["sliding_attention"] * 2}
STACKS = {
    "Gemma 3": (26, SIXTH, [Stack("model.layers", 26, 1, 6)], [1 + 2 * 6 + 1]),
    "Gemma 2": (12, {}, [Stack("model.layers", 12, 1, 2)], [1 + 2 * 2 + 1]),
    "ModernBERT": (22, {}, [Stack("model.layers", 22, 1, 3)], [1 + 2 * 3 + 3]),
    "DeepSeek V3": (9, {"first_k_dense_replace": 3}, [Stack("model.layers", 9, 3)], [3 + 2 + 1]),
    "Qwen2-MoE": (9, {"decoder_sparse_step": 2}, [Stack("model.layers", 9, 1, 2)], [1 + 2 * 2 + 2]),
    "T5": (6, {"num_decoder_layers": 8}, [Stack("encoder.block", 6), Stack("decoder.block", 8)], [4, 4]),
    "BART": (5, {"encoder_layers": 3}, [Stack("model.decoder.layers", 5)], [4]),
    "CLIP": (6, {}, [Stack("text_model.encoder.layers", 6), Stack("vision_model.encoder.layers", 6)], [4, 4]),
    "GPT-Neo": (
        8,
        {"attention_types": [[["global"] * 4 + ["local"] * 4, 1]]},
        [Stack("transformer.h", 8, 4)],
        [4 + 2 + 1],
    ),
    "SegFormer": (6, {}, [], []),
    "DPT": (12, {"backbone_out_indices": [2, 5, 8, 11]}, [], []),
}


@pytest.mark.parametrize("kind", list(STACKS))
def test_layers_that_repeat_are_found_as_stacks(kind):
    n_layers, fields, expected, n_traced = STACKS[kind]
    entry = ALL[kind]
    config = getattr(transformers, entry.config)(**deepened(entry.fields, n_layers) | fields)
    model = getattr(transformers, entry.auto).from_config(config)
    found = alike_stacks(model)
    assert list(found) == expected and [stack.n_traced for stack in found] == n_traced
    before = model.config.to_dict()
    with shortened(model, found):
        assert [len(model.get_submodule(stack.path)) for stack in found] == n_traced
    assert [len(model.get_submodule(stack.path)) for stack in found] == [stack.n_layers for stack in found]
    assert model.config.to_dict() == before


def test_layers_that_are_few_are_not_copied():
    few = transformers.LlamaConfig(**SIZES | {"num_hidden_layers": 4}, num_key_value_heads=2)
    model = build_weightless(Task.TEXT_GENERATION, few, "float32")
    assert (alike_stacks(model), deep_paths(model)) == ((), ())


def test_a_shortened_model_is_itself_again():
    model = build_weightless(Task.TEXT_GENERATION, LLAMA, "float32")
    stacks = alike_stacks(model)
    assert stacks == (Stack("model.layers", N_LAYERS),) and deep_paths(model) == ("model.layers",)
    before = list(model.state_dict())
    with pytest.raises(RuntimeError, match="on purpose"), shortened(model, stacks):
        assert len(model.model.layers) == model.config.num_hidden_layers == 4
        raise RuntimeError("on purpose")
    assert list(model.state_dict()) == before and model.config.num_hidden_layers == N_LAYERS


def test_names_of_layers():
    names = LayerNames(Stack("model.layers", 40))
    assert names.layer("model.layers.12.mlp.up_proj.weight") == 12
    assert names.layer("past_key_values.3.key") == 3 and names.layer("present.3.value") == 3
    assert names.layer("model.norm.weight") is None and names.layer("other.model.layers.1.x") is None
    assert names.shifted("model.layers.2.q+model.layers.2.k", 15) == "model.layers.17.q+model.layers.17.k"
    assert names.shifted("['model.layers', 'model.layers.2']", 3) == "['model.layers', 'model.layers.5']"


def test_layers_are_units_by_their_period():
    names = LayerNames(Stack("h", 17, n_first=2, period=3))
    assert [names.unit(f"h.{layer}.q") for layer in range(11)] == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert names.unit("norm") is None


@pytest.mark.parametrize(
    ("stack", "n_given"), [(Stack("h", 6), 4), (Stack("h", 11, 1, 3), 8), (Stack("h", 17, 2, 3), 11)]
)
def test_the_names_of_all_layers_are_in_order(stack, n_given):
    names = LayerNames(stack)
    assert stack.n_traced == n_given
    given = ["ids", *(f"h.{layer}.{part}" for layer in range(n_given) for part in "kv"), "norm"]
    found = expanded(given, names.unit, names.shifted, stack=stack)
    assert found == ["ids", *(f"h.{layer}.{part}" for layer in range(stack.n_layers) for part in "kv"), "norm"]


def test_targets_must_be_those_of_every_layer_but_the_first():
    stack = Stack("h", 6)
    every = [f"h.{layer}.q" for layer in range(6)]
    assert is_uniform(every, stack) and is_uniform(every[1:], stack) and is_uniform(["head"], stack)
    assert not is_uniform(every[:-1], stack) and not is_uniform(["h.4.q"], stack)
    one_is_kept = graphs._Facts("model", SiteChoice(), {}, {}, {}, {}, ("h.4.q.weight",))
    assert not graphs._is_uniform(one_is_kept, stack) and graphs._is_uniform(replace(one_is_kept, kept=()), stack)
    every_second = [f"h.{layer}.q" for layer in range(1, 12, 2)]
    assert is_uniform(every_second, Stack("h", 12, 1, 2)) and not is_uniform(every_second, Stack("h", 12))


BY_NAME = {"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16"}


@pytest.mark.parametrize("dtype", BY_NAME)
def test_no_two_stand_ins_are_alike(dtype):
    """Of a layer's one number there are few values in bfloat16, and equal constants are made one."""
    names = [f"model.layers.{layer}.{what}" for layer in range(60) for what in ("scalar", "gain")]
    small = {name: np.ones((1,), ir.DataType[BY_NAME[dtype]].numpy()) for name in (*names, "model.norm.weight")}
    found = stand_ins(small, Stack("model.layers", 60))
    values = [float(found[name][0]) for name in names]
    assert len(set(values)) == 120 and not {0.0, 1.0} & set(values)
    assert found["model.norm.weight"] is small["model.norm.weight"]
    assert all(found[name].dtype == small[name].dtype for name in names)


def test_constants_that_layers_make_in_different_ways_are_none():
    stack = Stack("layers", 6)
    small = {f"layers.{layer}.norm.weight": np.full(2, layer, np.float32) for layer in range(6)}

    def derived(layer: int, number: int) -> Derived:
        name = f"layers.{layer}.norm.weight"
        return Derived(f"{name}.Add", name, (lambda array: array + number,))

    same = derived_of_all([derived(layer, 1) for layer in range(4)], small, stack)
    assert [same[f"layers.{layer}.norm.weight.Add"][0] for layer in range(6)] == [1, 2, 3, 4, 5, 6]
    assert derived_of_all([derived(0, 1), derived(1, 2)], small, stack) is None
