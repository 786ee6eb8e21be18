"""A base on disk: lazy reading, names, and what is refused before any work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BertForSequenceClassification, BertModel

from lora_export.base.checkpoint import Checkpoint, Located, checkpoint_names, locate, stored_apart
from lora_export.base.tasks import Task
from lora_export.base.weightless import build_weightless
from lora_export.errors import EnvironmentUnusable, InputRefused


def opened(folder: Path) -> Checkpoint:
    return Checkpoint.open(Located(folder, str(folder)))


def edited_config(own, base: Path, **changes: object) -> Path:
    folder = own(base)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_code_from_the_folder_is_never_run(bases, own, tmp_path):
    folder = edited_config(own, bases["bert"], model_type="mine", auto_map={"AutoModel": "evil.Model"})
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')")
    with pytest.raises(InputRefused, match="trust_remote_code") as refused:
        opened(folder)
    assert "evil.Model" in refused.value.found
    assert not (tmp_path / "pwned").exists()


def test_an_auto_map_beside_a_known_architecture_is_not_followed(bases, own, tmp_path):
    folder = edited_config(own, bases["bert"], auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"})
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')")
    checkpoint = opened(folder)
    build_weightless(Task.FEATURE_EXTRACTION, checkpoint.load_config(), "float32")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("model_type", ["mine", None, 3])
def test_an_unknown_architecture_is_refused(model_type, bases, own):
    with pytest.raises(InputRefused, match="Transformers does not know this base's architecture") as refused:
        opened(edited_config(own, bases["bert"], model_type=model_type))
    assert refused.value.found == repr(model_type)


def test_a_quantized_base_is_refused(bases, own):
    folder = own(bases["bert"])
    tensors = {"w": torch.zeros(4, 4, dtype=torch.int8), "scale": torch.zeros(4)}
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputRefused, match="stored in a dtype that is not exported") as refused:
        _ = opened(folder).dtype
    assert refused.value.found == "I8"


def names_of(folder: Path, task: Task, **changes: object) -> dict[str, str]:
    config = AutoConfig.from_pretrained(folder, **changes)
    return checkpoint_names(build_weightless(task, config, "float32"), opened(folder).files)


def test_names_of_a_base_without_a_head_get_the_models_prefix(bases):
    names = names_of(bases["bert"], Task.TEXT_CLASSIFICATION)
    assert names["bert.encoder.layer.0.attention.self.query.weight"] == "encoder.layer.0.attention.self.query.weight"
    assert "classifier.weight" not in names


def test_names_of_a_base_with_a_head_lose_the_prefix(bases):
    names = names_of(bases["classifier"], Task.FEATURE_EXTRACTION)
    assert names["encoder.layer.0.attention.self.query.weight"] == "bert.encoder.layer.0.attention.self.query.weight"
    assert not any("classifier" in name for name in names.values())


@pytest.mark.parametrize(
    ("base", "task", "model_class"),
    [
        ("bert", Task.FEATURE_EXTRACTION, BertModel),
        ("classifier", Task.TEXT_CLASSIFICATION, BertForSequenceClassification),
        ("classifier", Task.FEATURE_EXTRACTION, BertModel),
        ("llama", Task.TEXT_GENERATION, AutoModelForCausalLM),
        ("gpt2", Task.TEXT_GENERATION, AutoModelForCausalLM),
    ],
)
def test_the_named_tensors_are_those_that_from_pretrained_loads(base, task, model_class, bases):
    names, files = names_of(bases[base], task), opened(bases[base]).files
    truth = model_class.from_pretrained(bases[base]).state_dict()
    for path, stored in names.items():
        assert torch.equal(files.read(stored), truth[path]), path
    tied = {"lm_head.weight"} if task is Task.TEXT_GENERATION else set()
    assert set(truth) - set(names) <= tied


def test_a_tensor_of_another_shape_than_the_config_says_is_refused(bases):
    with pytest.raises(InputRefused, match="does not have the shape its config says") as refused:
        names_of(bases["classifier"], Task.TEXT_CLASSIFICATION, num_labels=7)
    assert "classifier" in refused.value.where
    assert (refused.value.expected, refused.value.found) in ((("[7]"), "[3]"), ("[7, 32]", "[3, 32]"))


def test_legacy_names_are_renamed_as_transformers_does(bases, tmp_path):
    """LayerNorm's `gamma` and `beta` of the first BERT checkpoints."""
    folder = tmp_path / "old"
    shutil.copytree(bases["bert"], folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    old = {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
        for k, v in tensors.items()
    }
    safetensors.torch.save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
    names = names_of(folder, Task.FEATURE_EXTRACTION)
    assert names["encoder.layer.1.output.LayerNorm.weight"] == "encoder.layer.1.output.LayerNorm.gamma"


# Where it is.


def test_a_folder_is_located_as_given(bases, monkeypatch):
    monkeypatch.chdir(bases["bert"].parent)
    found = locate("bert", kind="base")
    assert (found.path, found.given, found.revision) == (bases["bert"].resolve(), "bert", None)


@pytest.mark.parametrize("given", ["./nothing/here/at/all", "nothing", "a b/c", "../x/y/z"])
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused(given):
    with pytest.raises(InputRefused, match="The adapter is not a folder") as refused:
        locate(given, kind="adapter")
    assert refused.value.found == "nothing at this path"


def test_a_file_is_no_folder(bases):
    with pytest.raises(InputRefused, match="The base is not a folder") as refused:
        locate(str(bases["bert"] / "config.json"), kind="base")
    assert refused.value.found == "a file"


@pytest.mark.parametrize(("name", "step"), [("m.onnx", "the graph was made from"), ("m.safetensors", "the folder")])
def test_what_is_brought_in_a_checkpoint_s_place_has_its_own_way_out(name, step, tmp_path):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputRefused, match="The base is not a folder") as refused:
        locate(str(tmp_path / name), kind="base")
    assert step in refused.value.next_step


def test_an_adapter_in_the_base_s_place_is_named(adapters):
    with pytest.raises(InputRefused, match="The base is an adapter") as refused:
        Checkpoint.open(locate(str(adapters["chat"]), kind="base"))
    assert "BASE ADAPTER" in refused.value.next_step


def test_a_hub_id_without_a_hub_is_an_environment_error():
    """The tests run with HF_HUB_OFFLINE=1."""
    with pytest.raises(EnvironmentUnusable, match="is not a folder here and the hub cannot be reached") as refused:
        locate("nobody-9d2f/nothing", kind="base")
    assert "HF_HOME" in refused.value.next_step


def test_tied_tensors_that_are_stored_with_other_numbers_are_found(bases, tmp_path):
    config = AutoConfig.from_pretrained(bases["llama"])
    model = build_weightless(Task.TEXT_GENERATION, config, "float32")
    tensors = safetensors.torch.load_file(bases["llama"] / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    (tmp_path / "config.json").write_bytes((bases["llama"] / "config.json").read_bytes())
    for head, apart in ((None, ()), (embedding.clone(), ()), (embedding + 1, ("lm_head.weight",))):
        more = {} if head is None else {"lm_head.weight": head}
        safetensors.torch.save_file(tensors | more, tmp_path / "model.safetensors")
        files = opened(tmp_path).files
        assert stored_apart(model, checkpoint_names(model, files), files) == apart
        truth = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(truth.lm_head.weight, truth.model.embed_tokens.weight) == (not apart)
