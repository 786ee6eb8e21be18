"""A graph stamped out of one layer is the graph of the whole model."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from lora_export.base.layers import Stack, alike_layers, shortened
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
    made, original = [], graphs._reattached

    def keep(model: ir.Model, resolved):
        made.append(computed(model))
        return original(model, resolved)

    monkeypatch.setattr(graphs, "_reattached", keep)
    said: list[str] = []
    stamped_out = export(request, ExportOptions(tmp_path / "stamped", use_cache=False), remark=said.append)
    assert not [text for text in said if "trace alike" in text], "the layers are copied"
    monkeypatch.setattr(graphs, "alike_layers", lambda model: None)
    whole = export(request, ExportOptions(tmp_path / "whole", use_cache=False))
    assert made[0] == made[1] and stamped_out.contract.inputs == whole.contract.inputs
    assert [entry.name for entry in stamped_out.contract.adapter_inputs] == [
        entry.name for entry in whole.contract.adapter_inputs
    ]
    assert stamped_out.contract.outputs == whole.contract.outputs


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
    found = expanded(given, names.layer, names.moved, stack.n_layers)
    assert found == ["ids", *(f"h.{layer}.{part}" for layer in range(6) for part in "kv"), "norm"]


def test_targets_must_be_those_of_every_layer_but_the_first():
    stack = Stack("h", 6)
    every = [f"h.{layer}.q" for layer in range(6)]
    assert is_uniform(every, stack) and is_uniform(every[1:], stack) and is_uniform(["head"], stack)
    assert not is_uniform(every[:-1], stack) and not is_uniform(["h.4.q"], stack)
