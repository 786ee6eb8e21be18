"""`/v1/completions` of Marian, whose tokenizer has two vocabularies and no `tokenizer.json`: Transformers reads it."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import sentencepiece
import tiny
import torch
import transformers
from catalogue import ExportSpec, export_to
from live import running
from references import unmerged
from transformers import AutoTokenizer

PROMPTS = ("the json module decodes", "Serialize obj")


@pytest.fixture(scope="module")
def marian(tmp_path_factory, _silent_libraries) -> tuple[Path, Path]:
    """A base and an adapter."""
    folder = tmp_path_factory.mktemp("marian")
    text = folder / "text.txt"
    text.write_text(f"{json.__doc__}\n{json.dumps.__doc__}\n{json.load.__doc__}", encoding="utf-8")
    pieces: dict[str, int] = {"</s>": 0, "<unk>": 1}
    for side in ("source", "target"):
        sentencepiece.SentencePieceTrainer.train(
            input=str(text), model_prefix=str(folder / side), vocab_size=120, hard_vocab_limit=False, minloglevel=2
        )
        model = sentencepiece.SentencePieceProcessor(model_file=str(folder / f"{side}.model"))
        for number in range(model.get_piece_size()):
            pieces.setdefault(model.id_to_piece(number), len(pieces))
    pieces["<pad>"] = pad = len(pieces)
    (folder / "vocab.json").write_text(json.dumps(pieces), encoding="utf-8")
    files = {"source_spm": "source.model", "target_spm": "target.model", "vocab": "vocab.json"}
    tokenizer = transformers.MarianTokenizer(**{key: str(folder / name) for key, name in files.items()})
    config = transformers.MarianConfig(
        vocab_size=pad + 1, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
        bos_token_id=0, eos_token_id=0, pad_token_id=pad, decoder_start_token_id=pad, forced_eos_token_id=None,
    )  # fmt: skip
    model = tiny.randomize(transformers.MarianMTModel(config), "marian")
    for part in (tokenizer, model):
        part.save_pretrained(folder / "base")
    settings = peft.LoraConfig(
        task_type="SEQ_2_SEQ_LM", r=4, lora_alpha=16, target_modules=["q_proj", "fc1"], init_lora_weights=False
    )
    torch.manual_seed(0)
    peft.get_peft_model(model, settings).save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


def test_answers_are_those_of_transformers_and_peft(marian, tmp_path):
    base, adapter = marian
    assert not (base / "tokenizer.json").exists()
    export_to(tmp_path / "out", ExportSpec("marian", ("own",), "dynamic"), {"marian": base}, {"own": adapter})
    tokenizer = AutoTokenizer.from_pretrained(base)
    expected = {}
    for name, adapters in (("marian", []), ("own", [adapter])):
        model = unmerged(base, "MarianMTModel", adapters)
        for prompt in PROMPTS:
            given = tokenizer(prompt, return_tensors="pt")
            with torch.no_grad():
                ids = model.generate(**given, max_new_tokens=9, do_sample=False, num_beams=1)
            expected[name, prompt] = tokenizer.decode(ids[0], skip_special_tokens=True)
    assert all(expected["marian", prompt] != expected["own", prompt] for prompt in PROMPTS)
    with running(tmp_path / "out", model_name="marian") as live:
        client = live.openai()
        found = {
            (name, prompt): client.completions.create(model=name, prompt=prompt, max_tokens=9).choices[0].text
            for name, prompt in expected
        }
    assert found == expected
