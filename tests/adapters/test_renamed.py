"""Adapters that name modules as Transformers 4 did: the pairs, ranks and scales are those of today's modules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import AutoConfig

from lora_export.adapters.folder import AdapterFolder, open_adapter
from lora_export.adapters.foreign import source_hashes
from lora_export.adapters.peft_reader import read_trained_adapter
from lora_export.adapters.renamed import folder_with_todays_names, with_todays_names
from lora_export.base.tasks import Task
from lora_export.base.weightless import build_weightless
from lora_export.errors import InputRefused

TASK = Task.IMAGE_CLASSIFICATION
OLD = "vit.encoder.layer.{}.attention.attention.{}"


def saved(folder: Path, **config: object) -> Path:
    """Pairs on the queries, of rank 2 and in layer 1 of rank 3, and on the values; a head saved whole."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    tensors = {"base_model.model.classifier.weight": torch.randn(3, 32, generator=generator)}
    tensors["base_model.model.classifier.bias"] = torch.randn(3, generator=generator)
    for layer in range(2):
        for name in ("query", "value"):
            rank = 3 if (layer, name) == (1, "query") else 2
            key = f"base_model.model.{OLD.format(layer, name)}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, 32, generator=generator)
            tensors[f"{key}.lora_B.weight"] = torch.randn(32, rank, generator=generator)
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    fields = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["query", "value"], "use_rslora": False,
        "rank_pattern": {r"layer.1.attention.attention.query": 3}, "alpha_pattern": {"value": 5},
        "modules_to_save": ["classifier"], "base_model_name_or_path": "x/y",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(fields | config))
    return folder


@pytest.fixture(scope="module")
def vit(bases) -> torch.nn.Module:
    return build_weightless(TASK, AutoConfig.from_pretrained(bases["vit"]), "float32")


def opened(folder: Path) -> AdapterFolder:
    return open_adapter(folder, str(folder), "a")


def test_ranks_scales_and_tensors_arrive_under_todays_names(vit, tmp_path):
    folder = opened(saved(tmp_path / "a"))
    found = read_trained_adapter(with_todays_names(folder, vit), vit)
    tensors = safetensors.torch.load_file(folder.path / "adapter_model.safetensors")
    assert len(found.lora) == 4
    for layer in range(2):
        for old, new in (("query", "q_proj"), ("value", "v_proj")):
            pair = found.lora[f"vit.layers.{layer}.attention.{new}"]
            rank = 3 if (layer, old) == (1, "query") else 2
            assert (pair.rank, pair.scale) == (rank, (5 if old == "value" else 6) / rank)
            assert pair.a.equal(tensors[f"base_model.model.{OLD.format(layer, old)}.lora_A.weight"])
            assert pair.b.equal(tensors[f"base_model.model.{OLD.format(layer, old)}.lora_B.weight"])
    assert found.replaced["classifier.weight"].equal(tensors["base_model.model.classifier.weight"])


def test_the_hashes_stay_those_of_the_users_files(bases, tmp_path):
    path = saved(tmp_path / "a")
    made = folder_with_todays_names(path, bases["vit"], TASK)
    assert made != path and source_hashes(made) == source_hashes(path)


def test_todays_names_stay_as_they_are(adapters, bases, vit):
    folder = opened(adapters["sights"])
    assert with_todays_names(folder, vit) is folder
    assert folder_with_todays_names(adapters["sights"], bases["vit"], TASK) == adapters["sights"]


def test_what_names_modules_in_other_ways_is_refused_with_both_names(vit, tmp_path):
    folder = opened(saved(tmp_path / "a", target_parameters=["x"]))
    with pytest.raises(
        InputRefused, match="trained under Transformers 4, which called modules of this base"
    ) as refused:
        with_todays_names(folder, vit)
    assert "vit.layers.0.attention.q_proj" in refused.value.expected
    assert OLD.format(0, "query") in refused.value.found and "target_parameters" in refused.value.found
