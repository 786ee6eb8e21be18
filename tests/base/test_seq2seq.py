"""The three graphs of an encoder-decoder: what each is traced with."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from lora_export.base.seq2seq import seq2seq_sample
from lora_export.base.tasks import Task, graphs_of
from lora_export.base.trace import trace
from lora_export.base.weightless import build_weightless
from lora_export.graph.sites import module_of

TASKS = {"t5": Task.TEXT2TEXT_GENERATION, "bart": Task.TEXT2TEXT_GENERATION, "whisper": Task.SPEECH_RECOGNITION}


@pytest.fixture(scope="module")
def models(bases) -> dict[str, torch.nn.Module]:
    configs = {base: AutoConfig.from_pretrained(bases[base]) for base in TASKS}
    return {base: build_weightless(TASKS[base], config, "float32") for base, config in configs.items()}


@pytest.mark.parametrize("base", TASKS)
def test_samples_run_and_every_varying_axis_is_named(base, models):
    for graph in graphs_of(TASKS[base]):
        sample = seq2seq_sample(models[base], graph)
        assert list(sample.dynamic_shapes) == list(sample.inputs)
        outputs = sample.forward(**sample.inputs)
        assert next(iter(outputs)) == ("last_hidden_state" if graph == "encoder_model" else "logits")
        for name, array in sample.inputs.items():
            shapes = sample.dynamic_shapes[name]
            arrays = array if isinstance(array, list) else [array]
            for one, shape in zip(arrays, shapes if isinstance(shapes, list) else [shapes], strict=True):
                sizes = {"batch_size": 2, "decoder_sequence_length": 7, "past_decoder_sequence_length": 5,
                         "encoder_sequence_length": 50 if base == "whisper" else 11}  # fmt: skip
                assert {axis: one.shape[axis] for axis in shape} == {a: sizes[d.__name__] for a, d in shape.items()}


def test_later_steps_make_no_keys_of_the_source(models):
    """They read the first step's; the encoder's states are not an input and its modules are not called."""
    model = models["bart"]
    before = model.forward
    graph = trace(Task.TEXT2TEXT_GENERATION, model, "decoder_with_past_model").graph
    assert model.forward == before and "forward" not in vars(model)
    called = {module_of(node) for node in graph.all_nodes() if node.op_type in ("MatMul", "Gemm")}
    assert "model.decoder.layers.1.encoder_attn.q_proj" in called and "lm_head" in called
    assert not any("encoder_attn.k_proj" in module or module.startswith("model.encoder.") for module in called)
    assert "encoder_hidden_states" not in {value.name for value in graph.inputs}
    states = [value for value in graph.initializers if value.startswith("model.encoder.")]
    assert not states


def test_the_question_of_overflow_is_put_back(models):
    original = torch.isfinite
    sample = seq2seq_sample(models["bart"], "encoder_model")
    sample.forward(**sample.inputs)
    assert torch.isfinite is original
