"""Decoders with one head of keys and values for all queries (Falcon): exported, and run step by step on their cache."""

from __future__ import annotations

import numpy as np
import tiny
import torch
import transformers
from catalogue import ExportSpec, export_to

from lora_export import AdapterSession


def test_a_multi_query_decoder_gives_what_pytorch_gives(tmp_path, adapters, _silent_libraries):
    config = transformers.FalconConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, multi_query=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = tiny.randomize(transformers.FalconForCausalLM(config), "falcon").eval()
    model.save_pretrained(tmp_path / "base")
    export_to(tmp_path / "out", ExportSpec("falcon", (), "merge"), {"falcon": tmp_path / "base"}, adapters)
    session = AdapterSession(tmp_path / "out", "cpu")
    past = [spec for spec in session.manifest.contract.inputs if spec.name.startswith("past_key_values.")]
    assert {spec.dims[1] for spec in past} == {1} and len(past) == 4
    ids = np.random.default_rng(0).integers(4, tiny.VOCABULARY, (2, 9))
    mask = np.ones_like(ids)
    mask[1, :3] = 0
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        expected = model(**{name: torch.from_numpy(array) for name, array in given.items()}).logits.numpy()
    real = mask.astype(bool)
    found = session.run({"input_ids": ids, "attention_mask": mask})
    np.testing.assert_allclose(found["logits"][real], expected[real], atol=2e-5)
