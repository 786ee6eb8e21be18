"""The traced graph: names, symbolic axes, module paths, and no weights in it."""

from __future__ import annotations

from importlib.metadata import version

import onnx_ir as ir
import pytest
import torch

from lora_export.base.forward import cache_argument
from lora_export.base.tasks import Task
from lora_export.base.trace import _name_cache
from lora_export.errors import EnvironmentUnusable
from lora_export.graph.sites import module_of
from lora_export.graph.unbound import recipe_of


def dims(values) -> dict[str, list]:
    return {v.name: [d if isinstance(d, int) else d.value for d in v.shape] for v in values}


def test_a_decoder(traces):
    graph, *_ = traces("llama", Task.TEXT_GENERATION)
    past = {
        f"past_key_values.{layer}.{part}": ["batch_size", 2, "past_sequence_length", 16]
        for layer in (0, 1)
        for part in ("key", "value")
    }
    assert (
        dims(graph.inputs)
        == {
            "input_ids": ["batch_size", "sequence_length"],
            "attention_mask": ["batch_size", "total_sequence_length"],
            "position_ids": ["batch_size", "sequence_length"],
        }
        | past
    )
    present = {
        name.replace("past_key_values", "present"): ["batch_size", 2, "total_sequence_length", 16] for name in past
    }
    assert dims(graph.outputs) == {"logits": ["batch_size", "sequence_length", 260]} | present


def test_an_encoder(traces):
    graph, *_ = traces("bert", Task.FEATURE_EXTRACTION)
    names = ("input_ids", "attention_mask", "token_type_ids")
    assert dims(graph.inputs) == {name: ["batch_size", "sequence_length"] for name in names}
    assert dims(graph.outputs) == {
        "last_hidden_state": ["batch_size", "sequence_length", 32],
        "pooler_output": ["batch_size", 32],
    }


def test_an_image_model(traces):
    graph, *_ = traces("vit", Task.IMAGE_CLASSIFICATION)
    assert dims(graph.inputs) == {"pixel_values": ["batch_size", 3, 16, 16]}
    assert dims(graph.outputs) == {"logits": ["batch_size", 3]}


def test_a_dual_encoder_has_a_batch_of_texts_and_a_batch_of_images(traces):
    graph, *_ = traces("clip", Task.ZERO_SHOT_IMAGE_CLASSIFICATION)
    assert dims(graph.inputs) == {
        "input_ids": ["text_batch_size", "sequence_length"],
        "attention_mask": ["text_batch_size", "sequence_length"],
        "pixel_values": ["image_batch_size", 3, 16, 16],
    }
    assert dims(graph.outputs) == {
        "logits_per_image": ["image_batch_size", "text_batch_size"],
        "logits_per_text": ["text_batch_size", "image_batch_size"],
        "text_embeds": ["text_batch_size", 16],
        "image_embeds": ["image_batch_size", 16],
    }


@pytest.mark.parametrize(
    ("base", "task"),
    [("llama", Task.TEXT_GENERATION), ("bert", Task.FEATURE_EXTRACTION), ("vit", Task.IMAGE_CLASSIFICATION)],
)
def test_parameters_are_unbound_initializers_under_their_paths(base, task, traces):
    graph, model, _ = traces(base, task)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    unbound = {name: value for name, value in graph.initializers.items() if value.const_value is None}
    # An embedding and the head tied to it are one initializer, under either name.
    tied = {"lm_head.weight", "model.embed_tokens.weight"}
    assert set(parameters) - set(unbound) <= tied and (base != "llama" or set(unbound) & tied)
    for name, value in unbound.items():
        assert list(value.shape) == list(parameters[name].shape), name
        assert recipe_of(value).parameters == (name,)
    bound = sum(v.const_value.nbytes for v in graph.initializers.values() if v.const_value is not None)
    assert bound < 20_000, "weights are in the graph"


@pytest.mark.parametrize(
    ("base", "task"),
    [("llama", Task.TEXT_GENERATION), ("bert", Task.FEATURE_EXTRACTION), ("vit", Task.IMAGE_CLASSIFICATION)],
)
def test_every_linear_map_names_its_module(base, task, traces):
    graph, model, _ = traces(base, task)
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    named = {module_of(node) for node in graph.all_nodes() if node.op_type in ("MatMul", "Gemm")}
    assert linear <= named


def test_the_model_is_left_as_it_was(traces):
    _, model, before = traces("bert", Task.FEATURE_EXTRACTION)
    after = {name: (id(t), t.stride()) for name, t in model.state_dict(keep_vars=True).items()}
    assert after == before and not model.training


@pytest.mark.parametrize("prefix", ["input.past_key_values.", "past_key_values.", "input.cache.", "cache.", ""])
def test_a_traced_cache_is_named_whatever_the_release_calls_it(prefix):
    """Transformers 5.24 calls a model's cache `cache`; 5.23 called it `past_key_values`."""
    parts = [f"layers.{layer}.{part}s" for layer in range(2) for part in ("key", "value")]
    graph = graph_of([f"{prefix}{part}" for part in parts], [f"output.cache.{part}" for part in parts])
    _name_cache(graph, 2)
    names = [f"{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    assert [value.name for value in graph.inputs] == [f"past_key_values.{name}" for name in names]
    assert [value.name for value in graph.outputs] == [f"present.{name}" for name in names]


def test_a_cache_that_is_named_in_an_unknown_way_is_an_error_of_the_environment():
    graph = graph_of(["state.0.k", "state.0.v"], ["layers.0.keys", "layers.0.values"])
    with pytest.raises(EnvironmentUnusable, match="names a traced decoder's cache in a way that is not known") as found:
        _name_cache(graph, 1)
    assert version("transformers") in found.value.where and "state.0.k" in found.value.found


def graph_of(inputs: list[str], outputs: list[str]) -> ir.Graph:
    return ir.Graph([ir.Value(name=name) for name in inputs], [ir.Value(name=name) for name in outputs], nodes=[])


@pytest.mark.parametrize(("argument", "expected"), [("cache", "cache"), ("past_key_values", "past_key_values")])
def test_the_cache_argument_is_what_forward_calls_it(argument, expected):
    scope: dict = {}
    exec(f"def forward(input_ids, {argument}=None): ...", scope)
    assert cache_argument(scope["forward"]) == expected
