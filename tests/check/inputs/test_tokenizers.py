"""Which tokenizer a check reads texts with: the adapter's, the export's, or none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny

from lora_export.artifact import read_manifest
from lora_export.check.context import CheckOptions
from lora_export.check.inputs.prepared import prepare
from lora_export.check.inputs.tokenizers import SeededTokenizer, tokenizer_of
from lora_export.errors import InputRefused
from lora_export.integrity.sources import SourceOverrides
from lora_export.pipeline import check
from lora_export.report.text import render_check_text
from lora_export.verdict import Verdict


def without_tokenizer(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    return folder


@pytest.mark.parametrize("name", ["bert-dynamic", "llama-merged", "t5-merged", "clip-merged"])
def test_a_check_without_a_tokenizer_runs_on_seeded_tokens_and_says_so(name, exports, own):
    report, _ = check(without_tokenizer(own(exports[name])), SourceOverrides(), CheckOptions(provider="cpu"))
    assert report.verdict is Verdict.PASS, [(case.name, case.failures) for case in report.cases if case.failures]
    assert report.data == (
        "default: 16 rows of seeded token ids in place of texts, as neither the export nor an adapter of it has a tokenizer",
    )
    assert "seeded token ids" in " ".join(render_check_text(report).split())


def test_texts_of_the_user_need_a_tokenizer(exports, own, tmp_path):
    folder = without_tokenizer(own(exports["bert-merged"]))
    (tmp_path / "a.txt").write_text("one line")
    with pytest.raises(InputRefused, match="no tokenizer, so the data's texts cannot") as refused:
        check(folder, SourceOverrides(), CheckOptions(provider="cpu", data={None: tmp_path / "a.txt"}))
    assert "--data" in refused.value.next_step


def test_seeded_tokens_are_the_same_every_time_and_mean_nothing_to_the_model(exports):
    made = SeededTokenizer.of(exports["clip-merged"])
    found = made(["a text of some length, so that there are tokens", "b"], padding_side="left", max_length=96)
    again = made(["a text of some length, so that there are tokens", "b"], max_length=96)
    ids, mask = found["input_ids"], found["attention_mask"]
    assert mask.sum(axis=1).tolist() == [11, 2] and mask[1].tolist() == [0] * 9 + [1, 1]
    assert np.array_equal(ids[0], again["input_ids"][0]) and again["attention_mask"][1].tolist() == [1, 1] + [0] * 9
    assert set(ids[0][:-1].tolist()).isdisjoint({0, 1}) and ids[0][-1] == 1, "its end token, and no other special one"
    assert ids.max() < tiny.VOCABULARY
    assert made(["x" * 5000], max_length=made.model_max_length)["input_ids"].shape == (1, 95)


@pytest.mark.parametrize("place", [".", "adapters/chat"])
def test_an_adapter_s_tokenizer_serves_where_the_base_has_none(place, exports, own):
    folder = without_tokenizer(own(exports["llama-dynamic"]))
    file = folder / "lora_export.json"
    fields = json.loads(file.read_text())
    fields["adapters"][0]["preprocessing"] = place
    file.write_text(json.dumps(fields))
    (folder / place).mkdir(exist_ok=True)
    tiny.save_tokenizer(folder / place, classifier=True)
    manifest = read_manifest(folder)
    ids = tokenizer_of(folder, manifest)(["ab"])["input_ids"][0]
    assert ids[0] == 1 and ids[-1] == 2, "its [CLS] and [SEP]"
    prepared = prepare(folder, manifest, {})
    assert "docstrings" in prepared.data[None].description


def test_an_adapter_is_compared_on_tokens_of_its_own_tokenizer(exports, own):
    folder = own(exports["llama-dynamic"])
    file = folder / "lora_export.json"
    fields = json.loads(file.read_text())
    fields["adapters"][0]["preprocessing"] = "adapters/chat"
    file.write_text(json.dumps(fields))
    (folder / "adapters/chat").mkdir()
    tiny.save_tokenizer(folder / "adapters/chat", classifier=True)
    batches = prepare(folder, read_manifest(folder), {}).batches
    assert set(batches) == {None, "chat"}
    assert (batches["chat"][0].inputs["input_ids"][:, 0] == 1).all()
    assert not (batches[None][0].inputs["input_ids"][:, 0] == 1).any()
