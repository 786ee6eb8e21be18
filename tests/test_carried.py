"""What a host needs beside the graph: whose tokenizer an export has, and where the others lie."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import transformers

from lora_export.artifact import read_manifest
from lora_export.carried import copy_carried, plan_added, plan_carried
from lora_export.errors import InputRefused
from lora_export.export.plan import Request, make_plan
from lora_export.integrity.sources import SourceOverrides
from lora_export.pipeline import ExportOptions, add_adapter, export
from lora_export.trial import run_trial

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
CHAT = "<|im_start|>hi<|im_end|>"


def with_tokenizer(adapter: Path, folder: Path, base: Path, *tokens: str, template: str | None = None) -> Path:
    """A copy of `adapter` whose trainer saved its tokenizer: the base's, with these tokens and this chat template."""
    shutil.copytree(adapter, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def tokens_of(folder: Path, text: str = CHAT) -> list[int]:
    return transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]


@pytest.fixture(scope="module")
def roomy(bases, tmp_path_factory) -> Path:
    """The decoder with rows for more tokens than its tokenizer has, as published ones have."""
    folder = tmp_path_factory.mktemp("carried") / "roomy"
    model = transformers.AutoModelForCausalLM.from_pretrained(bases["llama"])
    model.resize_token_embeddings(tiny.VOCABULARY + 4, mean_resizing=False)
    model.save_pretrained(folder)
    tiny.save_tokenizer(folder, classifier=False)
    return folder


def write(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).write_text(f"{folder.name} {name}")
    return folder


def test_files_of_a_host_are_carried_and_no_others(tmp_path):
    base = write(tmp_path / "base", "LICENSE", "NOTICE.txt", "generation_config.json", "secret.env", "modeling.py")
    adapter = write(tmp_path / "adapter", "LICENSE.md", "optimizer.pt")
    out = tmp_path / "out"
    out.mkdir()
    copied = copy_carried(plan_carried(base, {"topic": adapter}, "merge"), out)
    assert set(copied) == {path.name for path in out.iterdir()} == {
        "LICENSE", "NOTICE.txt", "generation_config.json", "LICENSE.topic.md",
    }  # fmt: skip


def test_a_group_is_taken_whole(tmp_path):
    """No file of the base's tokenizer stays beside the adapter's; what is not of the tokenizer does."""
    base = write(tmp_path / "base", "vocab.json", "merges.txt", "tokenizer_config.json", "generation_config.json")
    adapter = write(tmp_path / "adapter", "tokenizer.json")
    carried = plan_carried(base, {"chat": adapter}, "merge")
    assert carried.files == {
        "tokenizer.json": adapter / "tokenizer.json",
        "generation_config.json": base / "generation_config.json",
    }
    assert carried.places == {"chat": "."}


def test_a_chat_template_alone_goes_with_the_base_s_tokenizer(tmp_path):
    base = write(tmp_path / "base", "tokenizer.json", "chat_template.jinja")
    adapter = write(tmp_path / "adapter", "chat_template.jinja")
    carried = plan_carried(base, {"chat": adapter}, "merge")
    assert carried.files == {
        "tokenizer.json": base / "tokenizer.json",
        "chat_template.jinja": adapter / "chat_template.jinja",
    }


def test_the_base_s_tokenizer_saved_again_is_the_base_s(bases, adapters, tmp_path):
    """A trainer saves it beside every adapter, in other bytes and with the state of its last call."""
    again = with_tokenizer(adapters["chat"], tmp_path / "again", bases["llama"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(again)
    tokenizer.padding_side = "left"
    tokenizer("text", truncation=True, max_length=3, padding="max_length")
    tokenizer.save_pretrained(again)
    assert (again / "tokenizer.json").read_bytes() != (bases["llama"] / "tokenizer.json").read_bytes()
    assert plan_carried(bases["llama"], {"again": again}, "merge").places == {}


@pytest.mark.parametrize("mode", ["merge", "dynamic"])
def test_an_export_has_the_tokenizer_that_its_adapter_was_trained_with(mode, roomy, adapters, tmp_path):
    mine = with_tokenizer(adapters["chat"], tmp_path / "mine", roomy, "<|im_start|>", "<|im_end|>", template=TEMPLATE)
    out, said = tmp_path / "out", []
    request = Request(str(roomy), ((str(mine), None),), mode)
    manifest = export(request, ExportOptions(out), remark=said.append)
    assert said[0] == "the export has the tokenizer of adapter 'mine' in place of the base's"
    assert tokens_of(out) == tokens_of(mine) != tokens_of(roomy)
    assert transformers.AutoTokenizer.from_pretrained(out).chat_template == TEMPLATE
    assert manifest.adapter("mine").preprocessing == "." == read_manifest(out).adapter("mine").preprocessing
    assert {"tokenizer.json", "chat_template.jinja"} <= set(manifest.files)


def test_several_adapters_of_a_dynamic_export_keep_their_own(bases, adapters, tmp_path):
    mine = Path(shutil.copytree(adapters["chat"], tmp_path / "mine"))
    tiny.save_tokenizer(mine, classifier=True)  # it puts [CLS] and [SEP] around a text
    out = tmp_path / "out"
    pair = ((str(mine), None), (str(adapters["code"]), None))
    said = []
    manifest = export(Request(str(bases["llama"]), pair, "dynamic"), ExportOptions(out), remark=said.append)
    assert said == ["adapter 'mine' keeps its own tokenizer, other than the base's, in adapters/mine/"]
    assert manifest.adapter("mine").preprocessing == "adapters/mine"
    assert manifest.adapter("code").preprocessing is None
    assert tokens_of(out / "adapters/mine") == tokens_of(mine)
    assert tokens_of(out) == tokens_of(bases["llama"])
    assert "adapters/mine/tokenizer.json" in manifest.files
    # `run` reads a prompt with the tokenizer of the adapter that it is for.
    found = run_trial(out, ["a text"], {"mine": 1.0}, provider="cpu", max_new_tokens=4)["results"][0]["tokens"]
    from lora_export.runtime.adapter_session import AdapterSession
    from lora_export.runtime.generate import generate

    session = AdapterSession(out, "cpu")
    own, base = ([tokens_of(folder, "a text")] for folder in (mine, bases["llama"]))
    assert found == generate(session, own, "mine", max_new_tokens=4)[0]
    assert found != generate(session, base, "mine", max_new_tokens=4)[0]


def test_an_added_adapter_brings_its_own(roomy, adapters, tmp_path):
    out, said = tmp_path / "out", []
    export(Request(str(roomy), ((str(adapters["code"]), None),), "dynamic"), ExportOptions(out))
    mine = with_tokenizer(adapters["chat"], tmp_path / "mine", roomy, "<|im_start|>")
    assert plan_added(out, {"chat": adapters["chat"]}).files == {}
    manifest = add_adapter(out, ((str(mine), None),), SourceOverrides(), remark=said.append)
    assert said[0] == "adapter 'mine' keeps its own tokenizer, other than the export's, in adapters/mine/"
    assert manifest.adapter("mine").preprocessing == "adapters/mine"
    assert tokens_of(out / "adapters/mine") == tokens_of(mine)
    from lora_export.integrity.verify import verify

    assert verify(out).passed


@pytest.mark.parametrize("mode", ["merge", "dynamic"])
def test_tokens_without_a_row_in_the_model_are_refused(mode, bases, adapters, tmp_path):
    mine = with_tokenizer(adapters["chat"], tmp_path / "mine", bases["llama"], "<|im_start|>", "<|im_end|>")
    with pytest.raises(InputRefused, match="'mine' has tokens that the model has no rows for") as refused:
        make_plan(Request(str(bases["llama"]), ((str(mine), None),), mode))
    assert refused.value.found == "'<|im_start|>' (260), '<|im_end|>' (261)"
    assert refused.value.expected.startswith("ids below 260") and "save_embedding_layers" in refused.value.next_step


def test_a_padding_token_without_a_row_leaves_the_base_s_tokenizer(bases, adapters, tmp_path):
    """A trainer that needs padding adds a token for it; no model is ever given it where it is masked."""
    mine = with_tokenizer(adapters["chat"], tmp_path / "mine", bases["llama"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(mine)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(mine)
    plan = make_plan(Request(str(bases["llama"]), ((str(mine), None),), "merge"))
    assert plan.carried.places == {} and plan.carried.files["tokenizer.json"].parent == bases["llama"]
    assert plan.remarks == (
        "the tokenizer of adapter 'mine' pads with a token that the model has no row for: the base's is used",
    )


def test_merged_adapters_with_different_tokenizers_are_refused(bases, adapters, tmp_path):
    one = with_tokenizer(adapters["chat"], tmp_path / "one", bases["llama"], "<|a|>")
    other = with_tokenizer(adapters["code"], tmp_path / "other", bases["llama"], "<|b|>")
    folders = {"one": one, "other": other}
    with pytest.raises(InputRefused, match=r"trained with different files of their own \(tokenizer\)") as refused:
        plan_carried(bases["llama"], folders, "merge")
    assert str(one) in refused.value.where and "dynamic" in refused.value.next_step
    same = with_tokenizer(adapters["code"], tmp_path / "same", bases["llama"], "<|a|>")
    assert plan_carried(bases["llama"], {"one": one, "same": same}, "merge").places == {"one": ".", "same": "."}


def test_a_tokenizer_of_two_vocabularies_is_whole(tmp_path):
    """Marian's: one for what it reads and one for what it writes."""
    names = ("vocab.json", "source.spm", "target.spm", "tokenizer_config.json")
    base = write(tmp_path / "base", *names)
    assert set(plan_carried(base, {}, "merge").files) == set(names)


def test_generation_settings_of_an_adapter_are_its_own(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder, end in ((base, 2), (adapter, 7)):
        folder.mkdir()
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    carried = plan_carried(base, {"chat": adapter}, "merge")
    assert carried.files["generation_config.json"] == adapter / "generation_config.json"


def test_settings_that_another_release_saved_again_are_the_same(tmp_path):
    folders = {}
    for name, version in (("base", "5.20.0"), ("one", "5.23.0"), ("other", "5.24.0")):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        fields = {"eos_token_id": 2, "transformers_version": version, "_from_model_config": name == "base"}
        (folders[name] / "generation_config.json").write_text(json.dumps(fields))
    base = folders.pop("base")
    carried = plan_carried(base, folders, "merge")
    assert carried.files == {"generation_config.json": base / "generation_config.json"} and carried.places == {}


def test_the_base_s_files_stay_where_more_adapters_come_later(tmp_path):
    base, adapter = write(tmp_path / "base", "tokenizer.json"), write(tmp_path / "adapter", "chat_template.jinja")
    own = {"adapters/a/chat_template.jinja": adapter / "chat_template.jinja"}
    whole = plan_carried(base, {"a": adapter}, "dynamic")
    assert whole.places == {"a": "."} and "chat_template.jinja" in whole.files
    kept = plan_carried(base, {"a": adapter}, "dynamic", base_stays=True)
    assert kept.places == {"a": "adapters/a"} and kept.files == {"tokenizer.json": base / "tokenizer.json"} | own
