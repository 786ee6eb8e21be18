"""The reference: unmerged PEFT in PyTorch, in eval mode, at the export's dtype."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import torch

from lora_export.base.tasks import Task, auto_class
from lora_export.base.weightless import TORCH_DTYPES
from lora_export.quiet import quiet
from lora_export.weights import as_numpy


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter as PEFT saved it, and how the export uses it: see `AdapterRecord`."""

    path: Path
    weight: float = 1.0
    convert_rank: float | None = None


class Reference:
    """A base, with adapters or none, as PEFT runs it.

    One adapter, or several whose outputs PEFT adds up, run unmerged. Several that PEFT cannot add up at run time are
    summed as weights: `W0 + Σ w·(W_k − W0)`, each `W_k` merged by PEFT alone, in float32.

    Args:
        adapters: All active at once; none for the base alone.
        n_labels: Size of the head to build; None for the base's own.
    """

    def __init__(
        self, task: Task, base: Path, adapters: Sequence[TrainedAdapter], dtype: str, n_labels: int | None
    ) -> None:
        self._task, self._base, self._n_labels = task, base, n_labels
        self._dtype = TORCH_DTYPES[dtype]
        with quiet():
            if not adapters:
                model = self._load(self._dtype)
            elif len(adapters) == 1 and adapters[0].weight == 1:
                model = _with_one(self._load_for(adapters[0], self._dtype), adapters[0])
            elif all(map(_adds_up, adapters)):
                model = _with_several(self._load(self._dtype), adapters)
            else:
                model = self._summed(adapters)
        self._model = model.eval().requires_grad_(False)

    def _load(self, dtype: torch.dtype) -> torch.nn.Module:
        sizes = {} if self._n_labels is None else {"num_labels": self._n_labels, "ignore_mismatched_sizes": True}
        return auto_class(self._task).from_pretrained(
            self._base, dtype=dtype, trust_remote_code=False, local_files_only=True, **sizes
        )

    def _load_for(self, adapter: TrainedAdapter, dtype: torch.dtype) -> torch.nn.Module:
        """The base as the adapter was trained on it: with the vocabulary that its file has."""
        model = self._load(dtype)
        n_tokens = _vocabulary(adapter.path, model)
        if n_tokens is not None:
            model.resize_token_embeddings(n_tokens, mean_resizing=False)
        return model

    def _summed(self, adapters: Sequence[TrainedAdapter]) -> torch.nn.Module:
        model = _untied(self._load(torch.float32))
        base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        total = {name: tensor.clone() for name, tensor in base.items()}
        for adapter in adapters:
            merged = _with_one(_untied(self._load(torch.float32)), adapter).merge_and_unload().state_dict()
            for name, tensor in total.items():
                if tensor.is_floating_point():
                    tensor += adapter.weight * (merged[name] - base[name])
        model.load_state_dict(total)
        return model.to(self._dtype)

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs (`logits`, or `last_hidden_state`) in float32, `[batch, …]`, without a cache."""
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        tensors = {name: t.to(self._dtype) if t.is_floating_point() else t for name, t in tensors.items()}
        with torch.no_grad():
            found = self._model(**tensors)
        names = [name for name in ("logits", "last_hidden_state", "pooler_output") if found.get(name) is not None]
        return {name: as_numpy(found[name].float()) for name in names}

    @contextlib.contextmanager
    def without_pairs(self) -> Iterator[None]:
        """The same model with its adapted layers off, replaced modules (heads) staying."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [module for module in self._model.modules() if isinstance(module, BaseTunerLayer)]
        if not layers:  # summed as weights
            with self.without_adapter():
                yield
            return
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    @contextlib.contextmanager
    def without_adapter(self) -> Iterator[None]:
        """The base alone, its own head included."""
        if hasattr(self._model, "disable_adapter"):
            with self._model.disable_adapter():
                yield
            return
        changed, self._model = self._model, self._load(self._dtype).eval().requires_grad_(False)
        try:
            yield
        finally:
            self._model = changed

    def greedy(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Greedy continuations, each prompt alone, by full forward passes: no cache, no padding, no shared code."""
        return [self._greedy_one(list(prompt), max_new_tokens) for prompt in prompts]

    def _greedy_one(self, tokens: list[int], max_new_tokens: int) -> list[int]:
        start = len(tokens)
        for _ in range(max_new_tokens):
            with torch.no_grad():
                logits = self._model(input_ids=torch.tensor([tokens])).logits
            tokens.append(int(logits[0, -1].float().argmax()))
        return tokens[start:]


def _with_one(model: torch.nn.Module, adapter: TrainedAdapter) -> torch.nn.Module:
    from peft import PeftModel, get_peft_model, set_peft_model_state_dict
    from peft.tuners.lora.conversion import convert_to_lora

    loaded = PeftModel.from_pretrained(model, adapter.path)
    if adapter.convert_rank is None:
        return loaded
    config, state = convert_to_lora(loaded, adapter.convert_rank)
    converted = get_peft_model(loaded.unload(), config)
    set_peft_model_state_dict(converted, state)
    return converted


def _with_several(model: torch.nn.Module, adapters: Sequence[TrainedAdapter]) -> torch.nn.Module:
    """Plain LoRA adapters, all active: PEFT adds up what they give, each times its scale."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    names = [f"a{index}" for index in range(len(adapters))]
    loaded = PeftModel.from_pretrained(model, adapters[0].path, adapter_name=names[0])
    for name, adapter in zip(names[1:], adapters[1:], strict=True):
        loaded.load_adapter(adapter.path, adapter_name=name)
    loaded.base_model.set_adapter(names)
    for layer in filter(lambda module: isinstance(module, LoraLayer), loaded.modules()):
        for name, adapter in zip(names, adapters, strict=True):
            if name in layer.scaling:
                layer.scaling[name] *= adapter.weight
    return loaded


def _adds_up(adapter: TrainedAdapter) -> bool:
    """Whether the adapter is plain LoRA, whose output PEFT adds to the others' and scales by its weight."""
    config = json.loads((adapter.path / "adapter_config.json").read_text(encoding="utf-8"))
    others = ("use_dora", "lora_bias", "trainable_token_indices", "modules_to_save", "target_parameters", "kasa_config")
    is_plain = config["peft_type"] == "LORA" and not any(config.get(name) for name in others)
    keeps_base = config.get("bias", "none") == "none" and isinstance(config.get("init_lora_weights", True), bool)
    return is_plain and keeps_base


def _vocabulary(adapter: Path, model: torch.nn.Module) -> int | None:
    """The number of tokens of the embedding that the adapter's file brings, where it is not the base's."""
    if not hasattr(model, "get_input_embeddings"):
        return None
    table = model.get_input_embeddings()
    path = next((name for name, module in model.named_modules() if module is table), "")
    with safetensors.safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 not a dict
            if key.removeprefix("base_model.model.").replace(".base_layer.", ".") == f"{path}.weight":
                n_tokens = file.get_slice(key).get_shape()[0]
                return None if n_tokens == table.weight.shape[0] else n_tokens
    return None


def _untied(model: torch.nn.Module) -> torch.nn.Module:
    """Give tied parameters storage of their own, so that a merge changes the one that it means; the config still says
    that they are tied, which tells PEFT to change both where an adapter is for both."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in seen:
                module._parameters[name] = torch.nn.Parameter(parameter.detach().clone(), requires_grad=False)
            seen.add(id(module._parameters[name]))
    return model
