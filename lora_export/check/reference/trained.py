"""Adapters as PEFT runs them: one, several that add up, or converted to LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch

from lora_export.base.weightless import vocabulary_tables
from lora_export.reading import read_json

# PEFT would read a file onto a GPU where there is one; the reference's model goes where the check runs.
_READ_ON = "cpu"


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter as PEFT saved it, and how the export uses it: see `AdapterRecord`."""

    path: Path
    weight: float = 1.0
    convert_rank: float | None = None
    residual_base: bool = False


def with_one(model: torch.nn.Module, adapter: TrainedAdapter) -> torch.nn.Module:
    """`model` with the adapter, unmerged; another tuner converted by PEFT's own function, where the export did so."""
    from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
    from peft.tuners.lora.conversion import convert_to_lora

    config = PeftConfig.from_pretrained(adapter.path)
    if adapter.residual_base:
        config.init_lora_weights = True  # what its start takes off is off already
    loaded = PeftModel.from_pretrained(model, adapter.path, config=config, torch_device=_READ_ON)
    if adapter.convert_rank is None:
        return loaded
    config, state = convert_to_lora(loaded, adapter.convert_rank)
    converted = get_peft_model(loaded.unload(), config)
    set_peft_model_state_dict(converted, state)
    return converted


def with_several(model: torch.nn.Module, adapters: Sequence[TrainedAdapter]) -> torch.nn.Module:
    """Plain LoRA adapters, all active: PEFT adds up what they give, each times its scale."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    names = [f"a{index}" for index in range(len(adapters))]
    loaded = PeftModel.from_pretrained(model, adapters[0].path, adapter_name=names[0], torch_device=_READ_ON)
    for name, adapter in zip(names[1:], adapters[1:], strict=True):
        loaded.load_adapter(adapter.path, adapter_name=name, torch_device=_READ_ON)
    loaded.base_model.set_adapter(names)
    for layer in filter(lambda module: isinstance(module, LoraLayer), loaded.modules()):
        for name, adapter in zip(names, adapters, strict=True):
            if name in layer.scaling:
                layer.scaling[name] *= adapter.weight
    return loaded


def adds_up(adapter: TrainedAdapter) -> bool:
    """Whether the adapter is plain LoRA, whose output PEFT adds to the others' and scales by its weight."""
    config = read_json(adapter.path / "adapter_config.json")
    others = ("use_dora", "lora_bias", "trainable_token_indices", "modules_to_save", "target_parameters", "kasa_config")
    is_plain = config["peft_type"] == "LORA" and not any(config.get(name) for name in others)
    keeps_base = config.get("bias", "none") == "none" and isinstance(config.get("init_lora_weights", True), bool)
    return is_plain and keeps_base


def vocabulary_of(adapter: Path, model: torch.nn.Module) -> int | None:
    """The number of tokens of the embedding that the adapter's file brings, where it is not the base's."""
    shapes = {path: model.get_parameter(path).shape for path in vocabulary_tables(model)}
    with safetensors.safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 not a dict
            path = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
            if path in shapes and (n_tokens := file.get_slice(key).get_shape()[0]) != shapes[path][0]:
                return n_tokens
    return None


def untied(model: torch.nn.Module) -> torch.nn.Module:
    """Give tied parameters storage of their own, so that a merge changes the one that it means; the config still says
    that they are tied, which tells PEFT to change both where an adapter is for both."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in seen:
                module._parameters[name] = torch.nn.Parameter(parameter.detach().clone(), requires_grad=False)
            seen.add(id(module._parameters[name]))
    return model
