"""Rotary embedding inside the attention: its tables are the model's own, and only where they can stand in."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from onnx.reference import ReferenceEvaluator
from onnx_ir.convenience import extract
from onnx_ir.passes.common import TopologicalSortPass

from lora_export.base.tasks import Task
from lora_export.base.trace import longest_texts, trace
from lora_export.base.weightless import build_weightless
from lora_export.graph.fuse import fuse
from lora_export.graph.tape import Tape

SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 6000,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
LLAMA = transformers.LlamaConfig(**SIZES)
SCALED = transformers.LlamaConfig(**SIZES, rope_parameters=LINEAR)
PARTIAL = transformers.StableLmConfig(**(SIZES | {"hidden_size": 128}), partial_rotary_factor=0.5)


def fused(config: transformers.PretrainedConfig, positions: tuple[int, ...]) -> ir.Model:
    model = trace(Task.TEXT_GENERATION, build_weightless(Task.TEXT_GENERATION, config, "float32"))
    return fuse(model, "cpu", longest=positions)


def attentions(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "GroupQueryAttention"]


def evaluated(model: ir.Model, value: ir.Value) -> np.ndarray:
    part = ir.Model(extract(model.graph, [], [value]), ir_version=10)
    part.opset_imports.update(model.opset_imports)
    return ReferenceEvaluator(ir.to_proto(part)).run(None, {})[0]


def rows(config: transformers.PretrainedConfig) -> int:
    """A linear scale takes texts that are so much longer than the config's own number."""
    return 24000 if config is SCALED else 6000


@pytest.mark.parametrize("config", [LLAMA, SCALED, PARTIAL], ids=["plain", "scaled", "half of a head"])
def test_the_tables_are_the_models_own(config):
    model = fused(config, longest_texts(config))
    assert "RotaryEmbedding" not in {node.op_type for node in model.graph}
    nodes = attentions(model)
    assert len(nodes) == 2 and all(node.attributes.get_int("do_rotary") == 1 for node in nodes)
    assert len({(node.inputs[7], node.inputs[8]) for node in nodes}) == 1
    rotary, n_rows = (
        build_weightless(Task.TEXT_GENERATION, config, "float32").get_submodule("model.rotary_emb"),
        rows(config),
    )
    expected = rotary(torch.zeros(1), torch.arange(n_rows)[None])
    for table, whole in zip(nodes[0].inputs[7:9], expected, strict=True):
        half = whole[0, :, : whole.shape[2] // 2].numpy()
        assert list(table.shape) == [n_rows, half.shape[1]]
        np.testing.assert_allclose(evaluated(model, table), half, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "positions"),
    [({}, ()), ({}, ((1 << 20) + 1,)), ({"head_dim": 8}, (100,))],
    ids=["no number of positions", "too many", "heads that the operator does not turn"],
)
def test_where_the_tables_cannot_stand_in_the_traced_values_stay(changes, positions):
    model = fused(transformers.LlamaConfig(**SIZES, **changes), positions)
    assert sum(node.op_type == "RotaryEmbedding" for node in model.graph) == 4
    assert all(not node.attributes.get_int("do_rotary", 0) for node in attentions(model))


def test_a_text_may_be_longer_than_a_small_config_says():
    """PyTorch takes it too; the smallest table costs nothing."""
    model = fused(LLAMA, (100,))
    assert attentions(model)[0].inputs[7].shape[0] == 4096


def test_a_scale_that_does_not_fit_is_left_out():
    config = transformers.LlamaConfig(**(SIZES | {"max_position_embeddings": 1 << 18}), rope_parameters=LINEAR)
    assert longest_texts(config) == (1 << 20, 1 << 18)
    assert attentions(fused(config, (1 << 20, 1 << 18)))[0].inputs[7].shape[0] == 1 << 20
    assert attentions(fused(config, (1 << 21, 1 << 18)))[0].inputs[7].shape[0] == 1 << 18


@pytest.mark.parametrize("most", [16, 4000], ids=["a short text's end", "a long text's end"])
def test_values_that_go_by_the_longest_position_stay(most):
    """As those of longrope: other frequencies once a text is longer than the model was trained on."""
    model = trace(Task.TEXT_GENERATION, build_weightless(Task.TEXT_GENERATION, LLAMA, "float32"))
    frequencies = next(v for v in model.graph.initializers.values() if v.name.endswith("inv_freq"))
    product = next(node for node, _ in frequencies.uses())
    tape = Tape(model.graph, None)
    positions = next(value for value in model.graph.inputs if value.name == "position_ids")
    longest = tape.op("ReduceMax", [positions], [], ir.DataType.INT64, keepdims=0)
    is_long = tape.op("Greater", [longest, tape.scalar(most)], [], ir.DataType.BOOL)
    chosen = tape.op("Where", [is_long, tape.constant(frequencies.const_value.numpy() / 2), frequencies],
                     frequencies.shape, frequencies.dtype)  # fmt: skip
    product.replace_input_with(list(product.inputs).index(frequencies), chosen)
    TopologicalSortPass()(model)
    nodes = attentions(fuse(model, "cpu", longest=(6000,)))
    assert len(nodes) == 2 and all(not node.attributes.get_int("do_rotary", 0) for node in nodes)
