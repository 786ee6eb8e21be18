"""Encoder-decoders whose positions are computed, not stored: what is exported is what `from_pretrained` runs."""

from __future__ import annotations

import numpy as np
import pytest
import safetensors.torch
import tiny
import torch
import transformers
from catalogue import ExportSpec, export_to

from lora_export import Seq2SeqSession
from lora_export.errors import InputRefused

SIZES = {"vocab_size": tiny.VOCABULARY, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
         "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
         "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "scale_embedding": True}  # fmt: skip
KINDS = {
    "marian": (transformers.MarianMTModel, transformers.MarianConfig,
               {"pad_token_id": 3, "decoder_start_token_id": 3, "forced_eos_token_id": None}),
    "m2m_100": (transformers.M2M100ForConditionalGeneration, transformers.M2M100Config,
                {"pad_token_id": 0, "decoder_start_token_id": 2}),
}  # fmt: skip


def make_base(name: str, folder) -> None:
    kind, config, ids = KINDS[name]
    tiny.randomize(kind(config(**SIZES, **ids)), name).save_pretrained(folder)


@pytest.mark.parametrize("name", KINDS)
def test_outputs_are_those_of_from_pretrained(name, tmp_path, adapters, _silent_libraries):
    make_base(name, tmp_path / "base")
    stored = safetensors.torch.load_file(tmp_path / "base" / "model.safetensors")
    assert not any("embed_positions" in key for key in stored)
    export_to(tmp_path / "out", ExportSpec(name, (), "merge"), {name: tmp_path / "base"}, adapters)
    rng = np.random.default_rng(0)
    source, target = (rng.integers(4, tiny.VOCABULARY, (2, n)) for n in (30, 5))
    mask = np.ones_like(source)
    mask[1, 20:], source[1, 20:] = 0, KINDS[name][2]["pad_token_id"]
    inputs = {"input_ids": source, "attention_mask": mask, "decoder_input_ids": target}
    model = KINDS[name][0].from_pretrained(tmp_path / "base").eval()
    with torch.no_grad():
        expected = model(**{key: torch.from_numpy(value) for key, value in inputs.items()}).logits.numpy()
    session = Seq2SeqSession(tmp_path / "out", "cpu")
    np.testing.assert_allclose(session.run(inputs)["logits"], expected, atol=2e-5)
    _, state = session.begin({**inputs, "decoder_input_ids": target[:, :3]})
    later, _ = session.advance(state, target[:, 3:])
    np.testing.assert_allclose(later, expected[:, 3:], atol=2e-5)


def test_a_missing_weight_is_still_refused(tmp_path, adapters, _silent_libraries):
    base = tmp_path / "base"
    make_base("marian", base)
    stored = safetensors.torch.load_file(base / "model.safetensors")
    del stored["model.encoder.layers.0.fc1.weight"]
    safetensors.torch.save_file(stored, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputRefused, match="The base has no tensor for a parameter") as refused:
        export_to(tmp_path / "out", ExportSpec("marian", (), "merge"), {"marian": base}, adapters)
    assert refused.value.where.endswith("model.encoder.layers.0.fc1.weight")
    assert not (tmp_path / "out").exists()
