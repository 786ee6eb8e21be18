"""Parameters that Transformers makes of several stored tensors, or of a part of one."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

from lora_export.artifact import read_manifest
from lora_export.base.checkpoint import Checkpoint, Located, checkpoint_names
from lora_export.base.conversion import Converted
from lora_export.base.tasks import Task
from lora_export.base.weightless import build_weightless
from lora_export.errors import InputRefused
from lora_export.export.plan import Request
from lora_export.pipeline import ExportOptions, export

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 24, "vocab_size": 40}
# Twelve experts, so that the order of names is not the order of numbers.
EXPERTS = SMALL | {"num_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "num_key_value_heads": 2}
CONFIGS = {
    "mixtral": transformers.MixtralConfig(**SMALL, num_local_experts=12, num_key_value_heads=2),
    "qwen2-moe": transformers.Qwen2MoeConfig(**EXPERTS, shared_expert_intermediate_size=12),
    "qwen3-moe": transformers.Qwen3MoeConfig(**EXPERTS, head_dim=8),
    "olmoe": transformers.OlmoeConfig(**EXPERTS),
    "nomic-bert": transformers.NomicBertConfig(**SMALL),
    "gte": transformers.GteConfig(**SMALL),
}
DECODERS = ("mixtral", "qwen2-moe", "qwen3-moe", "olmoe")


def task_of(name: str) -> Task:
    return Task.TEXT_GENERATION if name in DECODERS else Task.FEATURE_EXTRACTION


@pytest.fixture(scope="module")
def stored(tmp_path_factory, _silent_libraries):
    """Folders by name, random and as `save_pretrained` writes them: in the layout of the published checkpoints."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            torch.manual_seed(0)
            auto = transformers.AutoModelForCausalLM if name in DECODERS else transformers.AutoModel
            made[name] = tmp_path_factory.mktemp("stored") / name
            auto.from_config(CONFIGS[name]).save_pretrained(made[name], max_shard_size="20KB")
        return made[name]

    return get


def truth_of(name: str, folder: Path) -> dict[str, torch.Tensor]:
    auto = transformers.AutoModelForCausalLM if name in DECODERS else transformers.AutoModel
    return auto.from_pretrained(folder).state_dict()


def names_of(name: str, folder: Path) -> tuple[dict[str, str | Converted], Checkpoint]:
    checkpoint = Checkpoint.open(Located(folder, str(folder)))
    model = build_weightless(task_of(name), checkpoint.load_config(), "float32")
    return checkpoint_names(model, checkpoint.files), checkpoint


def in_one_file(folder: Path, target: Path, tensors: dict[str, torch.Tensor]) -> Path:
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    safetensors.torch.save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in safetensors.torch.load_file(file).items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_is_what_from_pretrained_loads(name, stored):
    names, checkpoint = names_of(name, stored(name))
    truth = truth_of(name, stored(name))
    assert set(names) == set(truth)
    for path, expected in truth.items():
        assert torch.equal(checkpoint.read(names[path]), expected), path
    assert any(isinstance(entry, Converted) for entry in names.values())
    assert len(list(stored(name).glob("*.safetensors"))) > 1


@pytest.mark.parametrize("name", CONFIGS)
def test_a_checkpoint_in_the_converted_layout_needs_no_conversion(name, stored, tmp_path):
    truth = truth_of(name, stored(name))
    names, checkpoint = names_of(name, in_one_file(stored(name), tmp_path / "converted", truth))
    assert names == {path: path for path in truth}
    for path, expected in truth.items():
        assert torch.equal(checkpoint.read(names[path]), expected), path


def test_only_the_tensors_of_the_parameter_are_read(stored, monkeypatch):
    names, checkpoint = names_of("mixtral", stored("mixtral"))
    read: list[str] = []
    original = type(checkpoint.files).read

    def recorded(files, name: str) -> torch.Tensor:
        read.append(name)
        return original(files, name)

    monkeypatch.setattr(type(checkpoint.files), "read", recorded)
    assert read == []
    checkpoint.read(names["model.layers.1.mlp.experts.gate_up_proj"])
    expected = {f"model.layers.1.block_sparse_moe.experts.{j}.w{i}.weight" for j in range(12) for i in (1, 3)}
    assert set(read) == expected and len(read) == len(expected)


def test_an_export_does_not_depend_on_the_layout(stored, tmp_path):
    whole = in_one_file(stored("mixtral"), tmp_path / "whole", truth_of("mixtral", stored("mixtral")))
    for name, folder in (("parts", stored("mixtral")), ("whole", whole)):
        export(Request(str(folder), (), "merge"), ExportOptions(tmp_path / name / "out"))
    files = [read_manifest(tmp_path / name / "out").files for name in ("parts", "whole")]
    assert files[0]["model.onnx.data"] == files[1]["model.onnx.data"]
    assert files[0]["model.onnx"] == files[1]["model.onnx"]


def test_a_missing_expert_is_refused_by_shape(stored, tmp_path):
    tensors = all_tensors(stored("mixtral"))
    del tensors["model.layers.0.block_sparse_moe.experts.11.w2.weight"]
    with pytest.raises(InputRefused, match="does not have the shape its config says") as refused:
        names_of("mixtral", in_one_file(stored("mixtral"), tmp_path / "lacking", tensors))
    assert refused.value.where.endswith("experts.0.w2.weight … → model.layers.0.mlp.experts.down_proj")
    assert (refused.value.expected, refused.value.found) == ("[12, 16, 24]", "[11, 16, 24]")


def test_tensors_that_do_not_convert_are_refused(stored, tmp_path):
    tensors = all_tensors(stored("mixtral"))
    del tensors["model.layers.0.block_sparse_moe.experts.11.w3.weight"]
    with pytest.raises(InputRefused, match="Transformers cannot convert these tensors") as refused:
        names_of("mixtral", in_one_file(stored("mixtral"), tmp_path / "lacking", tensors))
    assert "experts.0.w1.weight" in refused.value.where
    assert refused.value.where.endswith("and 20 more → model.layers.0.mlp.experts.gate_up_proj")
    assert "a tensor of it may be missing" in refused.value.next_step


def test_a_parameter_stored_whole_and_in_parts_is_refused(stored, tmp_path):
    tensors = all_tensors(stored("mixtral"))
    whole = "model.layers.0.mlp.experts.down_proj"
    tensors[whole] = truth_of("mixtral", stored("mixtral"))[whole]
    with pytest.raises(InputRefused, match="stored twice, whole and in parts") as refused:
        names_of("mixtral", in_one_file(stored("mixtral"), tmp_path / "both", tensors))
    assert refused.value.where.endswith(whole)
    assert re.match(rf"{re.escape(whole)}, and .*experts\.0\.w2\.weight.* and 9 more", refused.value.found)


def test_a_config_of_another_size_is_refused_by_the_converted_shape(stored, tmp_path):
    folder = shutil.copytree(stored("qwen3-moe"), tmp_path / "wrong")
    config = json.loads((folder / "config.json").read_text()) | {"moe_intermediate_size": 9}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputRefused, match="does not have the shape its config says") as refused:
        names_of("qwen3-moe", folder)
    assert (refused.value.expected, refused.value.found) == ("[12, 16, 9]", "[12, 16, 8]")
