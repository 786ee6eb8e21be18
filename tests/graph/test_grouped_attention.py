"""Which decoders get one GroupQueryAttention a layer, and what a window does there."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers

from lora_export.base.tasks import Task
from lora_export.base.trace import sliding_windows, trace
from lora_export.base.weightless import build_weightless
from lora_export.contract import CacheLayout
from lora_export.export.plan import Request
from lora_export.graph.fuse import fuse
from lora_export.graph.grouped_attention import cache_layout
from lora_export.pipeline import ExportOptions, export
from lora_export.runtime.adapter_session import AdapterSession

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, architectures=["LlamaForCausalLM"])
WINDOW = transformers.MistralConfig(
    **SIZES, num_key_value_heads=2, head_dim=8, sliding_window=4, architectures=["MistralForCausalLM"]
)


@cache
def traced(config_class: type, fields: str, dtype: str) -> ir.Model:
    config = config_class.from_dict(json.loads(fields))
    return trace(Task.TEXT_GENERATION, build_weightless(Task.TEXT_GENERATION, config, dtype))


def fused(config: transformers.PretrainedConfig, dtype: str = "float32", provider: str = "cpu") -> ir.Model:
    model = traced(type(config), config.to_json_string(), dtype).clone()
    return fuse(model, provider, sliding_windows(config))


@pytest.mark.parametrize(
    "config",
    [LLAMA,
     transformers.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8, architectures=["Qwen3ForCausalLM"]),
     transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, architectures=["GPT2LMHeadModel"])],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_a_decoder_has_one_attention_operator_a_layer_and_no_mask(config):
    model = fused(config)
    count = Counter(node.op_type for node in model.graph)
    assert count["GroupQueryAttention"] == 2 and not count["Attention"] and not count["Softmax"]
    assert cache_layout(model) is CacheLayout.TOKENS
    readers = {node.op_type for node, _ in next(v for v in model.graph.inputs if v.name == "attention_mask").uses()}
    assert readers == {"Shape", "Slice"}
    for value in model.graph.inputs:
        if value.name.startswith("past_key_values."):
            assert {node.op_type for node, _ in value.uses()} <= {"GroupQueryAttention", "Shape"}


def test_what_the_operator_has_not_keeps_the_standard_one():
    """ALiBi's mask is not causal alone; float32 has no kernel on CUDA."""
    bloom = transformers.BloomConfig(
        vocab_size=64, hidden_size=32, n_layer=2, n_head=4, architectures=["BloomForCausalLM"]
    )
    for model in (fused(bloom), fused(LLAMA, "float32", "cuda")):
        assert "GroupQueryAttention" not in {node.op_type for node in model.graph}
        assert cache_layout(model) is CacheLayout.COLUMNS
    half = Counter(node.op_type for node in fused(LLAMA, "float16", "cuda").graph)
    assert half["GroupQueryAttention"] == 2


def test_a_window_counts_the_last_tokens(tmp_path):
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(WINDOW).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(tmp_path / "base")
    export(Request(str(tmp_path / "base"), (), "merge", None, "float32", "cpu"), ExportOptions(tmp_path / "out"))
    session = AdapterSession(tmp_path / "out", "cpu")
    ids = np.random.default_rng(0).integers(5, 60, (2, 13))
    mask = np.ones((2, 13), np.int64)
    mask[1, :3] = 0
    cache = session.cache(2, 13)
    parts = [
        session.run({"input_ids": ids[:, a:b], "attention_mask": mask[:, :b]}, cache=cache)["logits"]
        for a, b in ((0, 7), (7, 8), (8, 11), (11, 12), (12, 13))
    ]
    found = np.concatenate(parts, axis=1)
    for row in range(2):
        real = mask[row] == 1
        with torch.no_grad():
            expected = model(input_ids=torch.tensor(ids[row : row + 1, real])).logits[0].numpy()
        assert np.abs(found[row, real] - expected).max() < 1e-4 * np.abs(expected).max()
    model.config.sliding_window = None
    with torch.no_grad():
        whole = transformers.MistralForCausalLM(model.config).eval()
        whole.load_state_dict(model.state_dict())
        without = whole(input_ids=torch.tensor(ids[:1])).logits[0].numpy()
    assert np.abs(found[0] - without)[-1].max() > 1e-2 * np.abs(without).max(), "the window is seen"
