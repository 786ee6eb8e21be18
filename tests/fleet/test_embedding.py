"""A fleet whose graph makes embeddings of texts, as its adapters' sentence-transformers folders say."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from base.test_sentence_folder import write_dense, write_head
from command_line import call, fails
from peft import PeftModel
from transformers import AutoModel, AutoTokenizer

from lora_export import AdapterSession
from lora_export.artifact import read_manifest
from lora_export.base.sentence_folder import read_head
from lora_export.errors import InputRefused
from lora_export.export.again import merged_again
from lora_export.export.plan import make_plan
from lora_export.fleet.embedding import FleetEmbedding, settled
from lora_export.fleet.roster import Entry
from lora_export.fleet.sources import open_all
from lora_export.integrity.sources import SourceOverrides, locate_sources
from lora_export.integrity.verify import verify
from lora_export.sentence import Pooling, SentenceEmbedding, equal_embeddings

TEXTS = ["Open a socket.", "Größe, and a longer text than the other one."]
HOW = ("--provider", "cpu", "--workers", 1, "--rows", 4, "--pooling")


@pytest.fixture(scope="module")
def listed(tmp_path_factory, adapters, bases) -> Path:
    """Two adapters whose folders pool the mean through a linear layer, one that says nothing, one with another way."""
    folder = tmp_path_factory.mktemp("fleet") / "list"
    size = AutoModel.from_pretrained(bases["bert"]).config.hidden_size
    for name in ("a-cls", "mean", "other", "plain"):
        shutil.copytree(adapters["features"], folder / name)
    write_head(folder / "a-cls", pooling={"pooling_mode": "cls"})
    (folder / "mean/sentence_bert_config.json").write_text('{"max_seq_length": 64}')
    for name, scale in (("mean", 1.0), ("other", -1.0)):
        root = write_head(folder / name, "Normalize")
        dense = {"idx": 2, "name": "2", "path": "3_Dense", "type": "sentence_transformers.models.Dense"}
        modules = json.loads((root / "modules.json").read_text())
        (root / "modules.json").write_text(json.dumps([*modules[:2], dense, *modules[2:]]))
        write_dense(root / "3_Dense", {}, (4, size))
        _scale(root / "adapter_model.safetensors", scale)
    return folder


def _scale(file: Path, factor: float) -> None:
    tensors = safetensors.torch.load_file(file)
    changed = {name: tensor * factor if "lora_B" in name else tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(changed, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def served(listed, bases, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out") / "served"
    result = call("fleet", listed, bases["bert"], "-o", out, *HOW, "auto")
    assert result.exit_code == 0, result.output
    assert "4 adapters: 3 served, 1 refused." in result.output
    assert "remark  mean: the texts of an adapter are cut to 64 tokens, which hosts must do" in result.output
    return out


def _by_peft(base: Path, root: Path) -> np.ndarray:
    tokens = AutoTokenizer.from_pretrained(base)(TEXTS, return_tensors="pt", padding=True)
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(base), root).eval()
    with torch.no_grad():
        states, mask = model(**tokens).last_hidden_state, tokens["attention_mask"][:, :, None]
        layer = safetensors.torch.load_file(root / "3_Dense/model.safetensors")
        mean = (states * mask).sum(1) / mask.sum(1)
        values = torch.tanh(mean @ layer["linear.weight"].T + layer["linear.bias"])
        return torch.nn.functional.normalize(values).numpy()


def test_each_adapter_embeds_as_peft_and_its_folder_do(served, listed, bases):
    tokens = dict(AutoTokenizer.from_pretrained(served)(TEXTS, return_tensors="np", padding=True))
    session = AdapterSession(served, "cpu")
    name = "sentence_embedding"
    own = {each: session.run(tokens, each, outputs=[name])[name] for each in ("mean", "other", "plain")}
    for each in ("mean", "other"):
        np.testing.assert_allclose(own[each], _by_peft(bases["bert"], listed / each), atol=1e-5)
    np.testing.assert_allclose(own["plain"], own["mean"], atol=1e-6)
    assert np.abs(own["mean"] - own["other"]).max() > 0.01


def test_the_manifest_says_so_and_check_reads_it_from_a_served_adapter(served):
    manifest = read_manifest(served)
    assert manifest.sentence_embedding.source == "mean"
    assert [each is None for each in manifest.sentence_embedding.layers] == [False, True]
    assert "3_Dense/model.safetensors" in manifest.adapter("other").source.files and verify(served).passed
    report = json.loads((served / "reports/fleet.json").read_text())
    (refused,) = (each for each in report["adapters"] if each["outcome"] == "refused")
    assert refused["name"] == "a-cls" and refused["detail"]["expected"].startswith("mean, linear")
    assert json.loads(call("check", served, "--rows", 4, "--provider", "cpu", "--json").stdout)["verdict"] == "pass"


def test_bench_makes_base_and_merged_form_with_the_same_embedding(served):
    manifest = read_manifest(served)
    base, adapters = locate_sources(manifest, SourceOverrides())
    for folded in ([], ["plain"], ["other"]):
        head = make_plan(merged_again(manifest, base, adapters, folded=folded)).head
        assert equal_embeddings(head.embedding, manifest.sentence_embedding) and len(head.weights()) == 1


def test_a_renewed_fleet_keeps_its_embedding_and_its_adapters(served, listed, bases, tmp_path):
    copies = [shutil.copytree(each, tmp_path / each.name) for each in (listed, served)]
    shutil.rmtree(copies[0] / "mean")
    result = call("fleet", copies[0], bases["bert"], "-o", copies[1], *HOW, "auto", "--only-changed")
    assert result.exit_code == 3 and "1 adapter: 1 refused. 2 more are as they were" in result.output, result.output
    assert read_manifest(copies[1]).sentence_embedding.source == "other", "though as many say cls, and before it"
    described = call("fleet", copies[0], bases["bert"], "-o", copies[1], *HOW, "auto", "--dry-run").output
    size = read_manifest(served).sentence_embedding.layers[0].in_features
    assert f"embeds   by mean, linear {size} → 4 (Tanh), length 1" in described


def _opened(*folders: Path):
    entries = [Entry(folder.name, str(folder), "here") for folder in folders]
    return open_all(entries, "base", None, fetched=Path(), progress=lambda *_: None)[0]


def test_what_most_say_is_made_of_as_many_the_first(listed, bases):
    cls, mean, other, plain = _opened(*(listed / name for name in ("a-cls", "mean", "other", "plain")))
    base = str(bases["bert"])
    chosen, fitting, refused = settled([cls, mean, plain], base, "auto")
    assert chosen.names == ("a-cls",) and [each.reason for each in refused] == [
        f"Adapter 'mean' was trained with another embedding than the export makes ({listed / 'mean'})"
    ]
    assert [each.entry.name for each in fitting] == ["a-cls", "plain"]
    assert "1_Pooling/config.json" in fitting[0].hashes and fitting[1].hashes == plain.hashes
    chosen, fitting, _ = settled([cls, mean, other], base, "auto")
    assert chosen.names == ("mean", "other") and len(fitting) == 2
    assert chosen.root is not None and chosen.recorded(chosen.head.embedding, {"other"}).source == "other"
    named, fitting, refused = settled([cls, mean], base, "max")
    assert len(fitting) == 2 and not refused and named.root is None
    assert named.facts != chosen.facts != FleetEmbedding().facts == {}
    with pytest.raises(InputRefused, match="Neither the base nor an adapter says how"):
        settled([plain], base, "auto")


def test_an_adapter_whose_folder_says_nothing_counts_for_the_bases(listed, bases, tmp_path):
    """One that comes with another embedding does not change the fleet of all others."""
    base = write_head(shutil.copytree(bases["bert"], tmp_path / "base"), "Normalize")
    cls, plain = _opened(listed / "a-cls", listed / "plain")
    again = replace(plain, entry=replace(plain.entry, name="again"))
    chosen, fitting, refused = settled([cls, plain, again], str(base), "auto")
    assert chosen.described == "mean, length 1" and (chosen.root, chosen.names) == (None, ())
    assert [each.entry.name for each in fitting] == ["plain", "again"] and refused[0].name == "a-cls"
    chosen, fitting, _ = settled([cls, plain], str(base), "auto")
    assert chosen.names == ("a-cls",) and len(fitting) == 2, "of as many, the adapter's own"
    kept, *_ = settled([cls, plain], str(base), "auto", earlier=read_head(base, "").embedding)
    assert kept.described == "mean, length 1"
    alone, *_ = settled([cls], str(base), "auto", earlier=read_head(base, "").embedding)
    assert alone.names == ("a-cls",), "no adapter was trained with it"


def test_what_a_renewed_fleet_makes_stays_while_a_folder_says_so(listed, bases):
    cls, mean, other = _opened(*(listed / name for name in ("a-cls", "mean", "other")))
    made = settled([cls], str(bases["bert"]), "auto")[0].head.embedding
    assert settled([mean, other, cls], str(bases["bert"]), "auto", earlier=made)[0].names == ("a-cls",)
    assert settled([mean, other], str(bases["bert"]), "auto", earlier=made)[0].names == ("mean", "other")


def test_an_embedding_that_no_served_adapter_has_is_refused_unless_its_name_says_all(listed, bases):
    chosen, *_ = settled(_opened(listed / "mean"), str(bases["bert"]), "auto")
    with pytest.raises(InputRefused, match="No adapter is served whose folder says how"):
        chosen.recorded(chosen.head.embedding, {"plain"})
    plain = SentenceEmbedding((Pooling.MEAN,), source="mean")
    assert chosen.recorded(plain, {"plain"}) == SentenceEmbedding((Pooling.MEAN,))


def test_an_adapter_at_an_address_brings_its_modules(listed, bases, tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    for file in (listed / "mean").rglob("*"):
        if file.is_file():
            memory.pipe(f"/store/mean/{file.relative_to(listed / 'mean').as_posix()}", file.read_bytes())
    memory.pipe("/store/mean/model.safetensors", b"a base beside it")
    entries = [Entry("mean", "memory://store/mean", "here")]
    opened, refused = open_all(entries, "base", None, fetched=tmp_path, progress=lambda *_: None)
    assert not [each.reason for each in refused], refused[0].detail
    (here,) = settled(_opened(listed / "mean"), str(bases["bert"]), "auto")[1]
    (there,) = settled(opened, str(bases["bert"]), "auto")[1]
    assert here.hashes == there.hashes and not (tmp_path / "mean/model.safetensors").exists()


def test_a_task_without_embeddings_is_refused(listed, bases, tmp_path):
    wrong = ("--task", "fill-mask", "--dry-run")
    assert "--pooling is for embeddings of texts" in fails(
        2, "fleet", listed, bases["bert"], "-o", tmp_path / "o", *HOW, "mean", *wrong
    )
