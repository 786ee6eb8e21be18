"""The weightless base: no memory, right shapes, ties, and real values where the checkpoint has none."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AutoConfig

from lora_export.base.tasks import Task, auto_class
from lora_export.base.weightless import TORCH_DTYPES, build_weightless, parameter_aliases, untie
from lora_export.errors import InputRefused

CASES = [
    ("llama", Task.TEXT_GENERATION),
    ("gpt2", Task.TEXT_GENERATION),
    ("bert", Task.FEATURE_EXTRACTION),
    ("classifier", Task.TEXT_CLASSIFICATION),
    ("tagger", Task.TOKEN_CLASSIFICATION),
    ("albert", Task.FEATURE_EXTRACTION),
    ("vit", Task.IMAGE_CLASSIFICATION),
    ("t5", Task.TEXT2TEXT_GENERATION),
    ("bart", Task.TEXT2TEXT_GENERATION),
    ("whisper", Task.SPEECH_RECOGNITION),
]


@pytest.mark.parametrize(("base", "task"), CASES)
def test_it_is_the_real_model_without_its_numbers(base, task, bases):
    found = build_weightless(task, AutoConfig.from_pretrained(bases[base]), "float32")
    truth = auto_class(task).from_pretrained(bases[base])
    assert type(found) is type(truth)
    assert {n: t.shape for n, t in found.state_dict().items()} == {n: t.shape for n, t in truth.state_dict().items()}
    assert not found.training and not any(parameter.requires_grad for parameter in found.parameters())


@pytest.mark.parametrize(("base", "task"), CASES)
def test_parameters_take_no_memory(base, task, bases):
    model = build_weightless(task, AutoConfig.from_pretrained(bases[base]), "float32")
    for name, parameter in model.named_parameters():
        assert parameter.untyped_storage().nbytes() == 4, name
        assert set(parameter.stride()) <= {0}, name


@pytest.mark.parametrize(("base", "task"), CASES)
def test_buffers_that_no_checkpoint_holds_are_the_real_ones(base, task, bases):
    found = build_weightless(task, AutoConfig.from_pretrained(bases[base]), "float32")
    truth = auto_class(task).from_pretrained(bases[base])
    persistent = set(truth.state_dict())
    buffers = {name: tensor for name, tensor in truth.named_buffers() if name not in persistent}
    assert bool(buffers) == (base not in ("vit", "gpt2", "t5", "bart", "whisper")), (
        "these bases have such buffers, or the test says nothing"
    )
    mine = dict(found.named_buffers())
    for name, expected in buffers.items():
        assert mine[name].dtype == expected.dtype and torch.equal(mine[name], expected), name


def test_scaled_rotary_frequencies_are_the_real_ones(bases):
    """Llama 3's frequencies are computed from several settings, not one formula."""
    rope = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32, "rope_theta": 10000.0,
    }  # fmt: skip
    config = AutoConfig.from_pretrained(bases["llama"], rope_parameters=rope)
    found = build_weightless(Task.TEXT_GENERATION, config, "float32").model.rotary_emb
    truth = transformers.LlamaForCausalLM(config).model.rotary_emb
    plain = transformers.LlamaForCausalLM(AutoConfig.from_pretrained(bases["llama"])).model.rotary_emb
    assert torch.equal(found.inv_freq, truth.inv_freq)
    assert not torch.equal(truth.inv_freq, plain.inv_freq)
    assert found.attention_scaling == truth.attention_scaling


@pytest.mark.parametrize("dtype", list(TORCH_DTYPES))
def test_the_dtype_is_the_one_asked_for(dtype, bases):
    model = build_weightless(Task.TEXT_GENERATION, AutoConfig.from_pretrained(bases["llama"]), dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {TORCH_DTYPES[dtype]}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32, "frequencies stay in float32, as when trained"


def test_tied_weights_are_one_tensor(bases):
    config = AutoConfig.from_pretrained(bases["llama"])
    aliases = parameter_aliases(build_weightless(Task.TEXT_GENERATION, config, "float32"))
    both = ("model.embed_tokens.weight", "lm_head.weight")
    assert set(aliases["lm_head.weight"]) == set(aliases["model.embed_tokens.weight"]) == set(both)
    assert aliases["model.norm.weight"] == ("model.norm.weight",)
    config.tie_word_embeddings = False
    untied = parameter_aliases(build_weightless(Task.TEXT_GENERATION, config, "float32"))
    assert untied["lm_head.weight"] == ("lm_head.weight",)


def test_a_task_that_the_architecture_has_no_model_for_is_refused(bases):
    with pytest.raises(InputRefused, match="Transformers has no text-generation model for this base") as refused:
        build_weightless(Task.TEXT_GENERATION, AutoConfig.from_pretrained(bases["vit"]), "float32")
    assert refused.value.found == "vit" and "--task" in refused.value.next_step


def test_a_tied_head_can_be_untied(bases):
    model = build_weightless(Task.TEXT_GENERATION, AutoConfig.from_pretrained(bases["llama"]), "float32")
    shape = model.lm_head.weight.shape
    untie(model, ["lm_head.weight"])
    assert parameter_aliases(model)["lm_head.weight"] == ("lm_head.weight",)
    assert model.lm_head.weight.shape == shape and set(model.lm_head.weight.stride()) == {0}


def test_what_transformers_keeps_in_float32_stays_so(bases):
    found = build_weightless(Task.TEXT2TEXT_GENERATION, AutoConfig.from_pretrained(bases["t5"]), "float16")
    truth = auto_class(Task.TEXT2TEXT_GENERATION).from_pretrained(bases["t5"], dtype=torch.float16)
    dtypes = {name: tensor.dtype for name, tensor in truth.state_dict().items()}
    assert {name: tensor.dtype for name, tensor in found.state_dict().items()} == dtypes
    assert set(dtypes.values()) == {torch.float16, torch.float32}
