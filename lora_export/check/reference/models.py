"""The reference's model in PyTorch: a base with adapters as PEFT runs them, or summed or merged as weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_export.adapters.initialization import changes_base
from lora_export.base.checkpoint import Checkpoint, Located
from lora_export.base.tasks import Task, model_class
from lora_export.base.weightless import build_weightless
from lora_export.check.reference.on_integers import IntegerBase
from lora_export.check.reference.trained import TrainedAdapter, adds_up, untied, vocabulary_of, with_one, with_several
from lora_export.check.reference.widened import widened
from lora_export.quiet import quiet
from lora_export.reading import read_json

# Called with a key and what loads the base of that key.
Loader = Callable[[object, Callable[[], torch.nn.Module]], torch.nn.Module]


@dataclass(frozen=True)
class ModelSource:
    """What a model is made of; the fields are those of `Reference`.

    Attributes:
        dtype: float64 for a model whose large weights stay in float32 (`widened`).
        is_merged: Whether the adapters are in the weights.
    """

    task: Task
    base: Path
    adapters: Sequence[TrainedAdapter]
    dtype: torch.dtype
    n_labels: int | None = None
    pad_token_id: int | None = None
    integers: IntegerBase | None = None
    is_merged: bool = False

    @property
    def is_unmerged(self) -> bool:
        """Whether PEFT runs the adapters beside the base, so that they can be off."""
        is_one = len(self.adapters) == 1 and self.adapters[0].weight == 1
        return not self.is_merged and bool(self.adapters) and (is_one or all(map(adds_up, self.adapters)))

    @property
    def leaves_base(self) -> bool:
        """Whether the model can be made on a base that another is made on, too: PEFT's start changes nothing of it."""
        starts = (read_json(adapter.path / "adapter_config.json") for adapter in self.adapters)
        is_as_it_is = not self.adapters and not self.is_merged
        return is_as_it_is or (self.is_unmerged and not any(map(changes_base, starts)))

    def model(self, load: Loader | None = None) -> torch.nn.Module:
        """The model with its adapters, made anew.

        Args:
            load: What has the base loaded; for a source that leaves it as it is.
        """
        with quiet():
            return self._finished(self._made(load or _anew))

    def _finished(self, model: torch.nn.Module) -> torch.nn.Module:
        if self.dtype is torch.float64:
            inner_of(model).set_experts_implementation("eager")  # the grouped product of a mixture has no float64
            model = widened(model)
        return model.eval().requires_grad_(False)

    @property
    def _stored(self) -> torch.dtype:
        # Starts that change the base (PiSSA) want float32; what is to be float64 is made so once that is done.
        return torch.float32 if self.dtype is torch.float64 else self.dtype

    def _made(self, load: Loader) -> torch.nn.Module:
        if self.is_merged:
            return self._folded()
        if not self.adapters:
            return self._load(load, self._stored)
        if not self.is_unmerged:
            return self._summed()
        if len(self.adapters) == 1 and self.adapters[0].weight == 1:
            return with_one(self._load_for(load, self.adapters[0], self._stored), self.adapters[0])
        return with_several(self._load(load, self._stored), self.adapters)

    def _load(self, load: Loader, dtype: torch.dtype) -> torch.nn.Module:
        return load((self.base, dtype, self.n_labels), lambda: self._loaded(dtype))

    def _loaded(self, dtype: torch.dtype) -> torch.nn.Module:
        from transformers import AutoConfig

        options = {} if self.n_labels is None else {"num_labels": self.n_labels, "ignore_mismatched_sizes": True}
        checkpoint = Checkpoint.open(Located(self.base, str(self.base)))
        if checkpoint.quantization is None:
            config = AutoConfig.from_pretrained(self.base, trust_remote_code=False, local_files_only=True)
            model = model_class(self.task, config).from_pretrained(
                self.base, dtype=dtype, trust_remote_code=False, local_files_only=True, **options
            )
        else:
            state = {name: checkpoint.files.read(name) for name in checkpoint.files.tensors}
            config = checkpoint.load_config(**{name: n for name, n in options.items() if name == "num_labels"})
            options.pop("num_labels", None)
            kind = type(build_weightless(self.task, config, "float32"))  # an auto class wants a folder
            model = kind.from_pretrained(None, config=config, state_dict=state, dtype=dtype, **options)
        if self.pad_token_id is not None:
            model.config.get_text_config().pad_token_id = self.pad_token_id
        is_of_base = self.integers is not None and not self.integers.is_merged
        return self.integers.put_in(model) if is_of_base else model

    def _load_for(self, load: Loader, adapter: TrainedAdapter, dtype: torch.dtype) -> torch.nn.Module:
        """The base as the adapter was trained on it: with the vocabulary that its file has."""
        model = self._load(load, dtype)
        n_tokens = vocabulary_of(adapter.path, model)
        if n_tokens is not None:
            model.resize_token_embeddings(n_tokens, mean_resizing=False)
        return model

    def _folded(self) -> torch.nn.Module:
        """The adapters in the weights, as PEFT merges them; then, where they are quantized, those of the export."""
        adapters = self.adapters
        if len(adapters) == 1 and adapters[0].weight == 1:
            model = untied(self._load_for(_anew, adapters[0], torch.float32))
            model = with_one(model, adapters[0]).merge_and_unload().to(self._stored)
        elif adapters:
            model = self._summed()
        else:
            model = self._load(_anew, self._stored)
        return model if self.integers is None else self.integers.put_in(model)

    def _summed(self) -> torch.nn.Module:
        """The weighted sum of what PEFT's merge of each adapter makes of the weights, in float32."""
        model = untied(self._load(_anew, torch.float32))
        base = model.state_dict()
        total = {name: tensor.clone() for name, tensor in base.items()}
        for adapter in self.adapters:
            merged = with_one(untied(self._load(_anew, torch.float32)), adapter).merge_and_unload().state_dict()
            for name, tensor in total.items():
                if tensor.is_floating_point():
                    tensor += adapter.weight * (merged[name] - base[name])
        model.load_state_dict(total)
        return model.to(self._stored)


def inner_of(model: torch.nn.Module) -> torch.nn.Module:
    """The base's own model, whose modules go by the base's paths."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _anew(_key: object, load: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    return load()
