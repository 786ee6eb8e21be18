"""What a model computes and its checkpoint lacks: as `from_pretrained` gives it, and nothing else."""

from __future__ import annotations

import pytest
import torch
import transformers

from lora_export.base.computed import computed_parameters, tables_of_fixed_size
from lora_export.base.tasks import Task
from lora_export.base.weightless import build_weightless

SIZES = {"vocab_size": 50, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
         "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "max_position_embeddings": 20,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
CLASSES = {"Marian": "MarianMTModel", "Pegasus": "PegasusForConditionalGeneration"}


def weightless(name: str) -> torch.nn.Module:
    return build_weightless(Task.TEXT2TEXT_GENERATION, getattr(transformers, f"{name}Config")(**SIZES), "float32")


@pytest.mark.parametrize("name", CLASSES)
def test_missing_positions_are_what_from_pretrained_computes(name, tmp_path, _silent_libraries):
    model = weightless(name)
    getattr(transformers, CLASSES[name])(model.config).save_pretrained(tmp_path)
    loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path).state_dict()
    wanted = ["model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight", "final_logits_bias"]
    found = computed_parameters(model, [*wanted, "model.encoder.layers.0.fc1.weight", "model.shared.weight"])
    assert sorted(found) == sorted(wanted)
    for path, tensor in found.items():
        assert torch.equal(tensor, loaded[path]), path
    assert found[wanted[0]][1, 0] == pytest.approx(0.8414710, abs=1e-6)  # sin 1
    assert model.get_parameter(wanted[0]).stride() == (0, 0), "the weightless model is left as it was"


def test_nothing_missing_builds_nothing():
    assert computed_parameters(None, []) == {}


def test_what_training_changes_is_not_computed_though_it_starts_the_same(bases):
    """A norm starts as ones each time; a checkpoint without it is damaged."""
    config = transformers.AutoConfig.from_pretrained(bases["bert"])
    model = build_weightless(Task.FEATURE_EXTRACTION, config, "float32")
    assert computed_parameters(model, ["encoder.layer.0.output.LayerNorm.weight", "pooler.dense.bias"]) == {}


def test_a_growing_table_keeps_its_size_while_it_is_traced():
    model = weightless("M2M100")
    table, tokens = model.model.encoder.embed_positions, torch.ones(1, 40, dtype=torch.long)
    before = table.weights
    with tables_of_fixed_size(model), pytest.raises(IndexError):
        table(tokens)
    assert table.weights is before and "weights" in table._buffers and before.shape == (22, 16)
    table(tokens)
    assert len(table.weights) > 40
