"""Tensors and JSON of a base's folder: sharded, damaged, pickled, missing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from lora_export.base.checkpoint import Checkpoint, Located
from lora_export.base.stored import SafetensorsFiles
from lora_export.errors import InputRefused


def opened(folder: Path) -> Checkpoint:
    return Checkpoint.open(Located(folder, str(folder)))


@pytest.fixture
def sharded(bases, tmp_path) -> Path:
    folder = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(bases["llama"]).save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def test_every_tensor_is_read_as_stored(bases):
    checkpoint = opened(bases["llama"])
    truth = safetensors.torch.load_file(bases["llama"] / "model.safetensors")
    assert set(checkpoint.files.tensors) == set(truth)
    for name, tensor in truth.items():
        assert torch.equal(checkpoint.files.read(name), tensor)
        assert checkpoint.files.tensors[name].shape == tuple(tensor.shape)
    assert checkpoint.dtype == "float32"
    assert opened(bases["llama-f16"]).dtype == "float16"


def test_shards_read_as_one(bases, sharded):
    whole, parts = opened(bases["llama"]), opened(sharded)
    assert set(parts.files.tensors) == set(whole.files.tensors)
    assert len({info.file for info in parts.files.tensors.values()}) > 2
    for name in parts.files.tensors:
        assert torch.equal(parts.files.read(name), whole.files.read(name))


def test_a_missing_shard_is_refused_by_name(sharded):
    lost = sorted(sharded.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(InputRefused, match="index names files that are not there") as refused:
        opened(sharded)
    assert refused.value.found == lost.name


@pytest.mark.parametrize(
    ("index", "message", "found"),
    [
        ("{", "is not valid JSON", "Expecting property name"),
        ("[]", "holds no JSON object", "list"),
        ('{"weight_map": ["a"]}', "names files that are not there", "no weight_map"),
        ('{"weight_map": {"a": 3}}', "names files that are not there", "3"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "names files that are not there", "../model.safetensors"),
        ("{}", "names files that are not there", "no weight_map"),
    ],
)
def test_a_damaged_index_is_refused(index, message, found, sharded):
    shutil.copy(next(iter(sharded.glob("*.safetensors"))), sharded.parent / "model.safetensors")
    file = sharded / "model.safetensors.index.json"
    file.write_text(index)
    with pytest.raises(InputRefused, match=message) as refused:
        opened(sharded)
    assert refused.value.where == str(file) and refused.value.found.startswith(found)


@pytest.mark.parametrize("kept", [0, 7, 1000, -1])
def test_a_truncated_file_is_refused(kept, bases, own):
    folder = own(bases["bert"])
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(InputRefused, match="The file is truncated or not safetensors") as refused:
        opened(folder)
    assert refused.value.where == str(file) and "again" in refused.value.next_step


def test_a_tensor_stored_twice_is_refused(bases, tmp_path):
    copies = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for copy in copies:
        safetensors.torch.save_file({"w": torch.zeros(2)}, copy)
    with pytest.raises(InputRefused, match="Tensor w is stored twice") as refused:
        SafetensorsFiles.open(copies)
    assert str(copies[0]) in refused.value.found


def test_pickles_are_never_read(bases, own):
    folder = own(bases["bert"])
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputRefused, match="a pickle can run code, so it is never read") as refused:
        opened(folder)
    assert refused.value.found == "pytorch_model.bin"


def test_a_base_without_weights_or_config_is_refused(bases, own, tmp_path):
    folder = own(bases["bert"])
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputRefused, match="The base has no weights"):
        opened(folder)
    with pytest.raises(InputRefused, match=r"config\.json is missing"):
        opened(tmp_path)


@pytest.mark.parametrize(("text", "message"), [("{", "is not valid JSON"), ("[]", "holds no JSON object")])
def test_a_damaged_config_is_refused(text, message, bases, own):
    folder = own(bases["bert"])
    (folder / "config.json").write_text(text)
    with pytest.raises(InputRefused, match=message):
        opened(folder)


@pytest.mark.parametrize("has_single", [True, False])
@pytest.mark.parametrize("has_index", [True, False])
def test_the_files_read_are_those_that_transformers_reads(has_single, has_index, bases, sharded, tmp_path):
    """A folder may have both: `model.safetensors`, and the index and shards of an older save."""
    folder = tmp_path / "both"
    shutil.copytree(sharded, folder)
    for path in folder.glob("*.safetensors"):
        tensors = safetensors.torch.load_file(path)
        safetensors.torch.save_file({name: t + 1 for name, t in tensors.items()}, path, metadata={"format": "pt"})
    if has_single:
        shutil.copy(bases["llama"] / "model.safetensors", folder)
    if not has_index:
        (folder / "model.safetensors.index.json").unlink()
    if not (has_single or has_index):
        with pytest.raises(InputRefused, match="The base has no weights"):
            opened(folder)
        return
    files, name = opened(folder).files, "model.layers.1.mlp.up_proj.weight"
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()[name]
    assert torch.equal(files.read(name), loaded)
    assert (files.tensors[name].file.name == "model.safetensors") is has_single
