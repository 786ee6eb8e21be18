"""The reference: unmerged PEFT in PyTorch, in eval mode, at the export's dtype."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from lora_export.base.tasks import Task, model_class
from lora_export.base.weightless import TORCH_DTYPES
from lora_export.quiet import quiet
from lora_export.weights import as_numpy

_OUTPUTS = (
    "logits", "logits_per_image", "logits_per_text", "text_embeds", "image_embeds",
    "last_hidden_state", "pooler_output",
)  # fmt: skip


class Reference:
    """A base, with adapters or none, as PEFT runs it.

    Args:
        adapters: PEFT folders, all active at once (their deltas add up); none for the base alone.
        n_labels: Size of the head to build; None for the base's own.
    """

    def __init__(self, task: Task, base: Path, adapters: Sequence[Path], dtype: str, n_labels: int | None) -> None:
        from peft import PeftModel
        from transformers import AutoConfig

        sizes = {} if n_labels is None else {"num_labels": n_labels, "ignore_mismatched_sizes": True}
        with quiet():
            config = AutoConfig.from_pretrained(base, trust_remote_code=False, local_files_only=True)
            model = model_class(task, config).from_pretrained(
                base, dtype=TORCH_DTYPES[dtype], trust_remote_code=False, local_files_only=True, **sizes
            )
            if adapters:
                model = PeftModel.from_pretrained(model, adapters[0], adapter_name="a0")
                names = [f"a{index}" for index in range(len(adapters))]
                for name, folder in zip(names[1:], adapters[1:], strict=True):
                    model.load_adapter(folder, adapter_name=name)
                model.base_model.set_adapter(names)
        self._model = model.eval().requires_grad_(False)
        self._dtype = TORCH_DTYPES[dtype]

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs (`logits`, `last_hidden_state`, …) in float32, `[batch, …]`, without a cache."""
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        tensors = {name: t.to(self._dtype) if t.is_floating_point() else t for name, t in tensors.items()}
        with torch.no_grad():
            found = self._model(**tensors)
        names = [name for name in _OUTPUTS if found.get(name) is not None]
        return {name: as_numpy(found[name].float()) for name in names}

    @contextlib.contextmanager
    def without_pairs(self) -> Iterator[None]:
        """The same model with its LoRA pairs off, replaced modules (heads) staying."""
        from peft.tuners.lora import LoraLayer

        layers = [module for module in self._model.modules() if isinstance(module, LoraLayer)]
        before = [dict(layer.scaling) for layer in layers]
        for layer in layers:
            layer.scaling.update(dict.fromkeys(layer.scaling, 0.0))
        try:
            yield
        finally:
            for layer, scaling in zip(layers, before, strict=True):
                layer.scaling.update(scaling)

    @contextlib.contextmanager
    def without_adapter(self) -> Iterator[None]:
        """The base alone, its own head included."""
        with self._model.disable_adapter():
            yield
