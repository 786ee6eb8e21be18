"""The reference: unmerged PEFT in PyTorch, in eval mode, at the export's dtype."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from lora_export.base.tasks import Task, auto_class
from lora_export.base.weightless import TORCH_DTYPES
from lora_export.quiet import quiet
from lora_export.weights import as_numpy


class Reference:
    """A base, with adapters or none, as PEFT runs it.

    Args:
        adapters: PEFT folders, all active at once (their deltas add up); none for the base alone.
        n_labels: Size of the head to build; None for the base's own.
    """

    def __init__(self, task: Task, base: Path, adapters: Sequence[Path], dtype: str, n_labels: int | None) -> None:
        from peft import PeftModel

        sizes = {} if n_labels is None else {"num_labels": n_labels, "ignore_mismatched_sizes": True}
        with quiet():
            model = auto_class(task).from_pretrained(
                base, dtype=TORCH_DTYPES[dtype], trust_remote_code=False, local_files_only=True, **sizes
            )
            if adapters:
                model = PeftModel.from_pretrained(model, adapters[0], adapter_name="a0")
                names = [f"a{index}" for index in range(len(adapters))]
                for name, folder in zip(names[1:], adapters[1:], strict=True):
                    model.load_adapter(folder, adapter_name=name)
                model.base_model.set_adapter(names)
        self._model = model.eval().requires_grad_(False)
        # PEFT's own forward for this task type names text inputs; the pairs are in the base's modules all the same.
        takes_speech = adapters and task is Task.SPEECH_RECOGNITION
        self._forward = self._model.get_base_model() if takes_speech else self._model
        self._dtype = TORCH_DTYPES[dtype]

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs (`logits`, or `last_hidden_state`) in float32, `[batch, …]`, without a cache."""
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        tensors = {name: t.to(self._dtype) if t.is_floating_point() else t for name, t in tensors.items()}
        with torch.no_grad():
            found = self._forward(**tensors)
        names = [name for name in ("logits", "last_hidden_state", "pooler_output") if found.get(name) is not None]
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

    def greedy_targets(
        self, sources: list[dict[str, np.ndarray]], start_id: int, max_new_tokens: int
    ) -> list[list[int]]:
        """Greedy targets of an encoder-decoder, each source alone, by full forward passes: no cache, no padding."""
        found = []
        for source in sources:
            targets = [start_id]
            for _ in range(max_new_tokens):
                logits = self.run(source | {"decoder_input_ids": np.array([targets])})["logits"]
                targets.append(int(logits[0, -1].argmax()))
            found.append(targets[1:])
        return found
