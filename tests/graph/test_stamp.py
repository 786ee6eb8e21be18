"""A graph stamped out of one layer is the graph of the whole model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
import transformers
from architectures import CATALOGUE, make_base
from peft import LoraConfig, get_peft_model

from lora_export.base.layers import Stack, alike_layers, is_deep, shortened
from lora_export.base.recipe import RECIPE
from lora_export.base.tasks import Task
from lora_export.base.weightless import build_weightless
from lora_export.export import graphs
from lora_export.export.plan import Request
from lora_export.graph.layer_names import LayerNames, expanded, is_uniform
from lora_export.pipeline import ExportOptions, export

N_LAYERS = 6
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
SIZES["num_hidden_layers"] = N_LAYERS
LLAMA = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, architectures=["LlamaForCausalLM"])
BERT = transformers.BertConfig(**SIZES, max_position_embeddings=32, architectures=["BertModel"])
BASES = {
    "llama": (LLAMA, "CAUSAL_LM", "all-linear", "text-generation", "cuda"),
    "bert": (BERT, None, ["query", "value", "dense"], "feature-extraction", "cpu"),
}
CLASSES = {"llama": "LlamaForCausalLM", "bert": "BertModel"}
TRACED_WHOLE = "The base's layers could not be copied from one another, so all are traced, which takes longer."
# Layers of two kinds; one layer that is run several times; several stacks; a layer that reads what the one before the
# last gave, which of the traced layers the first is too near to the embedding for.
WHOLE = ("ModernBERT", "Gemma 2", "Gemma 3", "ALBERT", "CLIP", "T5", "T5 1.1", "BART", "Whisper", "GPT-NeoX")
# Of the kinds whose projections are fused in another way; all with `pytest --whole-matrix`.
FEW = ("GPT-2",)
_NUMBERS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers")


def computed(model: ir.Model) -> list[tuple]:
    """What each output is computed by, down to named inputs and weights with their recipes; constants by their bytes.

    Of which layer's cache a length is read is one, for all are of one length.
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


@pytest.mark.parametrize("name", list(BASES))
def test_a_stamped_graph_is_the_whole_models(name, tmp_path, monkeypatch):
    config, task_type, targets, task, provider = BASES[name]
    torch.manual_seed(0)
    model = getattr(transformers, CLASSES[name])(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(tmp_path / "base")
    options = LoraConfig(r=2, target_modules=targets, task_type=task_type, init_lora_weights=False)
    get_peft_model(model, options).save_pretrained(tmp_path / "adapter")
    request = Request(str(tmp_path / "base"), ((str(tmp_path / "adapter"), "a"),), "dynamic", task, "float32", provider)
    said, whole_said = require_same(request, tmp_path, monkeypatch)
    assert (said, whole_said) == ([], [TRACED_WHOLE]), "the layers are copied"


def require_same(request: Request, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[str]]:
    """The remarks of an export with copied layers and of one that traces all; both have the same graphs."""
    made, original = [], graphs._reattached

    def keep(model: ir.Model, resolved):
        made.append(computed(model))
        return original(model, resolved)

    monkeypatch.setattr(graphs, "_reattached", keep)
    said, whole_said = [], []
    stamped_out = export(request, ExportOptions(folder / "stamped", use_cache=False), remark=said.append)
    monkeypatch.setattr(graphs, "alike_layers", lambda model: None)
    whole = export(request, ExportOptions(folder / "whole", use_cache=False), remark=whole_said.append)
    n_graphs = len(whole.graphs)
    assert len(made) == 2 * n_graphs and made[:n_graphs] == made[n_graphs:]
    assert stamped_out.graphs.keys() == whole.graphs.keys()
    for name, contract in whole.graphs.items():
        found = stamped_out.graphs[name]
        assert (found.inputs, found.outputs) == (contract.inputs, contract.outputs)
        assert [each.name for each in found.adapter_inputs] == [each.name for each in contract.adapter_inputs]
    return said, whole_said


def deepened(fields: dict) -> dict:
    """A config's `fields` with `N_LAYERS` layers."""
    found = {name: deepened(value) if isinstance(value, dict) else value for name, value in fields.items()}
    found |= {name: N_LAYERS for name in _NUMBERS if name in fields}
    if "layer_types" in fields:
        found["layer_types"] = list(fields["layer_types"]) * (N_LAYERS // len(fields["layer_types"]))
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "architecture" in metafunc.fixturenames:
        metafunc.parametrize("architecture", CATALOGUE if metafunc.config.getoption("--whole-matrix") else FEW)


def test_every_architecture_is_stamped_as_it_is_traced_or_says_that_it_is_not(architecture, tmp_path, monkeypatch):
    """With one adapter on the architecture's usual targets; see ci/benchmarks/architectures.py."""
    entry = CATALOGUE[architecture]
    entry = replace(entry, fields=deepened(entry.fields))
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


@pytest.mark.parametrize("kind", ["Gemma 2", "ModernBERT"])
def test_layers_of_two_kinds_are_not_taken_for_alike(kind):
    config = getattr(transformers, CATALOGUE[kind].config)(**deepened(CATALOGUE[kind].fields))
    model = getattr(transformers, CATALOGUE[kind].auto).from_config(config)
    assert alike_layers(model) is None and is_deep(model)


def test_layers_that_differ_are_not_alike():
    other = transformers.Gemma3TextConfig(
        **SIZES, num_key_value_heads=2, head_dim=8, architectures=["Gemma3ForCausalLM"], sliding_window=4
    )
    assert alike_layers(build_weightless(Task.TEXT_GENERATION, other, "float32")) is None, "windows in some layers"
    few = transformers.LlamaConfig(**SIZES | {"num_hidden_layers": 4}, num_key_value_heads=2)
    assert alike_layers(build_weightless(Task.TEXT_GENERATION, few, "float32")) is None, "nothing to gain"


def test_a_shortened_model_is_itself_again():
    model = build_weightless(Task.TEXT_GENERATION, LLAMA, "float32")
    stack = alike_layers(model)
    assert stack == Stack("model.layers", N_LAYERS)
    before = list(model.state_dict())
    with pytest.raises(RuntimeError, match="on purpose"), shortened(model, stack):
        assert len(model.model.layers) == model.config.num_hidden_layers == 4
        raise RuntimeError("on purpose")
    assert list(model.state_dict()) == before and model.config.num_hidden_layers == N_LAYERS


def test_names_of_layers():
    names = LayerNames(Stack("model.layers", 40))
    assert names.layer("model.layers.12.mlp.up_proj.weight") == 12
    assert names.layer("past_key_values.3.key") == 3 and names.layer("present.3.value") == 3
    assert names.layer("model.norm.weight") is None and names.layer("other.model.layers.1.x") is None
    assert names.moved("model.layers.2.q+model.layers.2.k", 17) == "model.layers.17.q+model.layers.17.k"
    assert names.moved("['model.layers', 'model.layers.2']", 5) == "['model.layers', 'model.layers.5']"


def test_the_names_of_all_layers_are_in_order():
    stack, names = Stack("h", 6), LayerNames(Stack("h", 6))
    given = ["ids", "h.0.k", "h.0.v", "h.1.k", "h.1.v", "h.2.k", "h.2.v", "h.3.k", "h.3.v", "norm"]
    found = expanded(given, names.layer, names.moved, n_layers=stack.n_layers)
    assert found == ["ids", *(f"h.{layer}.{part}" for layer in range(6) for part in "kv"), "norm"]


def test_targets_must_be_those_of_every_layer_but_the_first():
    stack = Stack("h", 6)
    every = [f"h.{layer}.q" for layer in range(6)]
    assert is_uniform(every, stack) and is_uniform(every[1:], stack) and is_uniform(["head"], stack)
    assert not is_uniform(every[:-1], stack) and not is_uniform(["h.4.q"], stack)
