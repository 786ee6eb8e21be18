"""Classifiers on decoders: the token that they read is the last one that is no padding, whoever says what padding is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import transformers
from command_line import fails
from references import error, outputs_of, unmerged

from lora_export.artifact import read_manifest
from lora_export.check.context import CheckOptions
from lora_export.errors import InputRefused, UsageProblem
from lora_export.export.plan import Request, make_plan
from lora_export.integrity.sources import SourceOverrides
from lora_export.pipeline import ExportOptions, add_adapter, check, export
from lora_export.runtime.adapter_session import AdapterSession
from lora_export.verdict import Verdict

PAD, END = 0, 2
LLAMA = "LlamaForSequenceClassification"


@pytest.fixture(scope="module")
def base(tmp_path_factory, bases) -> Path:
    """A decoder whose config names no padding token, as LLaMA's; without a tokenizer."""
    folder = tmp_path_factory.mktemp("padding") / "base"
    shutil.copytree(bases["llama"], folder, ignore=shutil.ignore_patterns("token*"))
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"pad_token_id": None}))
    return folder


@pytest.fixture(scope="module")
def adapter(base) -> Path:
    options = {"task_type": "SEQ_CLS", "r": 4, "target_modules": ["q_proj", "v_proj"]}
    return tiny.adapter(base, base.parent / "reward", LLAMA, n_labels=1, **options)


def padded_with(adapter: Path, folder: Path, token: str | None, **config: object) -> Path:
    """A copy of `adapter`, with a tokenizer that pads with `token` and a config, as trainers save them."""
    shutil.copytree(adapter, folder)
    if token is not None:
        tiny.save_tokenizer(folder, classifier=False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        tokenizer.pad_token = token
        tokenizer.save_pretrained(folder)
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def request(base: Path, *adapters: Path, mode: str = "dynamic", **options: object) -> Request:
    return Request(str(base), tuple((str(adapter), None) for adapter in adapters), mode, **options)


def texts(pad: int) -> dict[str, np.ndarray]:
    """Rows padded with `pad` on the right; the tokens inside are others."""
    ids = np.random.default_rng(3).integers(4, tiny.VOCABULARY, (3, 9))
    mask = (np.arange(9) < np.array([[9], [6], [4]])).astype(np.int64)
    return {"input_ids": np.where(mask == 1, ids, pad), "attention_mask": mask}


@pytest.mark.parametrize(("mode", "pad"), [("merge", PAD), ("dynamic", END)])
def test_the_token_that_is_asked_for_is_padding(mode, pad, base, adapter, tmp_path):
    manifest = export(request(base, adapter, mode=mode, pad_token_id=pad), ExportOptions(tmp_path / "out"))
    assert manifest.pad_token_id == read_manifest(tmp_path / "out").pad_token_id == pad
    assert json.loads((tmp_path / "out/config.json").read_text())["pad_token_id"] == pad
    model = unmerged(base, LLAMA, [adapter], n_labels=1)
    model.config.pad_token_id = pad
    expected = outputs_of(model, texts(pad))
    session = AdapterSession(tmp_path / "out", "cpu")
    name = "reward" if mode == "dynamic" else None
    assert error(session.run(texts(pad), name)["logits"], expected) < 1e-5
    assert error(session.run(texts(2 - pad), name)["logits"], expected) > 1e-2
    if pad == END:
        report, _ = check(tmp_path / "out", SourceOverrides(), CheckOptions(provider="cpu"))
        assert report.verdict is Verdict.PASS, [(case.name, case.failures) for case in report.cases if case.failures]


def test_without_one_it_is_refused_by_the_name_of_the_option(base, adapter, tmp_path):
    said = " ".join(fails(3, "merge", base, adapter, "-o", tmp_path / "out").split())
    assert "needs a padding token" in said and "config.json: pad_token_id" in said and "--pad-token-id" in said
    assert not (tmp_path / "out").exists()
    text = fails(3, "merge", base, adapter, "-o", tmp_path / "out", "--pad-token-id", "999")
    assert "The padding token is no token of the model" in text and f"0 to {tiny.VOCABULARY - 1}" in text


def test_the_adapters_own_goes_before_the_bases(base, adapter, bases, tmp_path):
    with_pad = make_plan(request(bases["llama"], adapter))
    assert with_pad.pad_token_id == PAD and not any("token" in remark for remark in with_pad.remarks)
    by_tokenizer = make_plan(request(bases["llama"], padded_with(adapter, tmp_path / "a", "[SEP]")))
    assert by_tokenizer.pad_token_id == END == by_tokenizer.config.pad_token_id
    assert "not 2, the padding token of adapter 'a'; the base's config says 0" in by_tokenizer.remarks[0]
    by_config = make_plan(request(base, padded_with(adapter, tmp_path / "b", "[PAD]", pad_token_id=END)))
    assert by_config.pad_token_id == END and "the base's config names none" in by_config.remarks[0]
    asked = make_plan(request(base, padded_with(adapter, tmp_path / "c", "[SEP]"), pad_token_id=7))
    assert asked.pad_token_id == 7
    tiny.save_tokenizer(Path(shutil.copytree(base, tmp_path / "base")), classifier=False)
    assert make_plan(request(tmp_path / "base", adapter)).pad_token_id == PAD


def test_adapters_that_differ_are_refused(base, adapter, tmp_path):
    one, other = padded_with(adapter, tmp_path / "one", "[PAD]"), padded_with(adapter, tmp_path / "other", "[SEP]")
    with pytest.raises(InputRefused, match="different padding tokens") as refused:
        make_plan(request(base, one, other))
    assert refused.value.found == "one: 0, other: 2" and "--pad-token-id" in refused.value.next_step
    export(request(base, one), ExportOptions(tmp_path / "out"))
    with pytest.raises(InputRefused, match="another padding token than the export's") as refused:
        add_adapter(tmp_path / "out", [(str(other), None)])
    assert (refused.value.expected, refused.value.found) == ("0", "other: 2")
    assert add_adapter(tmp_path / "out", [(str(adapter), "same")]).adapter("same").name == "same"


def test_other_models_take_no_padding_token(bases, adapters):
    for name, of in (("bert", "topic"), ("llama", "chat")):
        assert make_plan(request(bases[name], adapters[of])).pad_token_id is None
        with pytest.raises(UsageProblem, match="--pad-token-id is for classifiers on decoders"):
            make_plan(request(bases[name], adapters[of], pad_token_id=1))
