"""Queries, keys and values from one product, with what adapters add; and taken apart again to be looked at."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import transformers

from lora_export.adapters.pack import choose_sites
from lora_export.base.tasks import Task
from lora_export.base.trace import trace
from lora_export.base.weightless import build_weightless
from lora_export.graph.adapter_inputs import add_adapter_inputs
from lora_export.graph.fuse import fuse
from lora_export.graph.taking_apart import take_apart
from lora_export.runtime.adapter_session import AdapterSession
from lora_export.site_choice import SiteChoice

SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
LAYERS = [f"model.layers.{n}.self_attn" for n in range(2)]


def fused(config: transformers.PretrainedConfig, projections: str = "", **options) -> ir.Model:
    model = trace(Task.TEXT_GENERATION, build_weightless(Task.TEXT_GENERATION, config, "float32"))
    targets = tuple(f"{layer}.{part}_proj" for layer in LAYERS for part in projections)
    choice: SiteChoice = choose_sites((), targets)
    return fuse(add_adapter_inputs(model, choice)[0], "cpu", longest=(64,), **options)


def products(model: ir.Model) -> list[str]:
    names = [node.inputs[1].name for node in model.graph if node.op_type == "MatMul"]
    return [name for name in names if ".self_attn." in name and "lora" not in name and "o_proj" not in name]


PACKED = [f"{layer}.q_proj.weight+{layer}.k_proj.weight+{layer}.v_proj.weight" for layer in LAYERS]


@pytest.mark.parametrize("projections", ["", "qv", "qkv"])
def test_projections_are_packed_with_what_adapters_add(projections):
    model = fused(transformers.LlamaConfig(**SIZES), projections)
    assert products(model) == PACKED
    count = Counter(node.op_type for node in model.graph)
    # What no adapter adds to keys is one value of zeros for all layers; the other one is of the tokens' order.
    assert count["ConstantOfShape"] == 1 + (projections == "qv")
    for node in model.graph:
        if node.op_type == "GroupQueryAttention":
            assert node.inputs[0].shape[2] == 64 + 32 + 32 and node.inputs[1] is None and node.inputs[2] is None


def test_biases_are_packed_with_their_projections():
    model = fused(transformers.Qwen2Config(**SIZES), "qv")
    assert products(model) == PACKED
    biases = [node for node in model.graph if node.op_type == "Concat" and (node.inputs[0].name or "").endswith("bias")]
    assert [[value.name for value in node.inputs] for node in biases] == [
        [f"{layer}.{part}_proj.bias" for part in "qkv"] for layer in LAYERS
    ]


def test_what_may_not_be_packed_is_not():
    """A quantizer keeps the values of one layer as they are."""
    kept = f"{LAYERS[0]}.v_proj.weight"
    model = fused(transformers.LlamaConfig(**SIZES), may_pack=lambda recipe: kept not in recipe.parameters)
    assert sorted(products(model)) == sorted([*PACKED[0].split("+"), PACKED[1]])


@pytest.mark.parametrize("name", ["llama-base", "llama-dynamic", "llama-int4", "llama-cuda-base", "llama-cuda"])
def test_a_graph_that_is_taken_apart_computes_the_same(name, exports):
    folder = exports[name]
    model = take_apart(ir.load(folder / "model.onnx"))
    splits = [
        node
        for node in model.graph
        if node.op_type == "Split" and "q_proj.weight" in node.inputs[0].producer().inputs[1].name
    ]
    assert len(splits) == 2
    session = AdapterSession(folder, "cpu")
    ids = np.array([[3, 5, 7, 9], [4, 6, 8, 2]])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    expected = session.run(feeds, outputs=["logits"])["logits"]
    options = ort.SessionOptions()
    options.log_severity_level = 3
    ir.save(model, folder / "apart.onnx")
    try:
        apart = ort.InferenceSession(folder / "apart.onnx", options, providers=["CPUExecutionProvider"])
        session.runs = session.runs.on(apart)
        found = session.run(feeds, outputs=["logits"])["logits"]
    finally:
        (folder / "apart.onnx").unlink()
    np.testing.assert_allclose(found, expected, atol=1e-5)
