"""A written config means what was asked for, module by module, when PEFT reads it."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lora_export.adapters.peft_writer import exact_names, write_config


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(6, 6)
        self.out = torch.nn.Linear(6, 6)


class Net(torch.nn.Module):
    """`fc` is the end of `block.fc` and of `block.inner.fc`."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(6, 6)
        self.block = Block()
        self.block.inner = Block()


def test_a_module_whose_path_ends_another_is_targeted_alone():
    assert exact_names(["b", "a.fc"], ["a.fc", "b", "xb", "a"]) == ["a.fc", "b"]
    assert exact_names(["fc"], ["fc", "block.fc"]) == "fc"
    assert exact_names(["fc", "block.fc"], ["fc", "block.fc"]) == ["block.fc", "fc"]


@pytest.mark.parametrize(
    "ranks",
    [
        {"fc": 2},
        {"fc": 2, "block.fc": 3},
        {"block.fc": 1, "block.inner.fc": 4},
        {"fc": 1, "block.fc": 2, "block.inner.fc": 3},
    ],
    ids=str,
)
def test_peft_resolves_every_rank_and_alpha(ranks, tmp_path):
    alphas = {module: 2.5 * index + 1 for index, module in enumerate(ranks)}
    everything = [name for name, _ in Net().named_modules()]
    write_config(tmp_path, ranks, alphas, everything=everything, options={"base_model_name_or_path": "somewhere"})
    model = get_peft_model(Net(), LoraConfig.from_pretrained(tmp_path))
    layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert {name: layer.r["default"] for name, layer in layers.items()} == ranks
    assert {name: layer.scaling["default"] for name, layer in layers.items()} == {
        m: alphas[m] / r for m, r in ranks.items()
    }
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "somewhere"
