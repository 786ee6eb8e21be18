"""One adapter after another of the same kind, read by PEFT.

PEFT takes half of the processor time of packing an adapter to put its layers into a base. It does the same for each
adapter of a kind, so those layers stay, and PEFT gives them the next one's tensors (`PeftModel.load_adapter`). What
else an adapter may change in the base, a head, an embedding or rows of one, is not shared: such kinds are read anew.
"""

from __future__ import annotations

import torch

from lora_export.adapters.factors import Adapter
from lora_export.adapters.folder import AdapterFolder
from lora_export.adapters.initialization import changes_base
from lora_export.adapters.peft_reader import adapter_in, load_again, load_with_peft
from lora_export.fleet.survey import kind_of


class ReaderOfKinds:
    """Reads adapters on weightless bases of one architecture; PEFT's layers of the kind that came last are kept."""

    def __init__(self) -> None:
        self._kind = ""
        self._model: torch.nn.Module | None = None

    def __call__(self, folder: AdapterFolder, base: torch.nn.Module) -> Adapter:
        """As `read_trained_adapter`."""
        kind, model = f"{kind_of(folder)} {folder.config.get('peft_version')}", self._model
        self._model = None  # what fails half-way is not used again
        if model is None or kind != self._kind or not load_again(folder, model):
            model = load_with_peft(folder, base)
        adapter = adapter_in(model, folder, base)
        if _is_plain(adapter):
            self._kind, self._model = kind, model
        return adapter


def _is_plain(adapter: Adapter) -> bool:
    """Whether it is pairs of LoRA on linear maps and nothing else."""
    others = (adapter.replaced, adapter.replaced_modules, adapter.base_copies, adapter.embeddings, adapter.token_rows)
    return (
        adapter.config.get("peft_type") == "LORA"
        and not changes_base(adapter.config)
        and not any((*others, adapter.layers, adapter.convolutions))
        and all(pair.magnitude is None and pair.bias is None for pair in adapter.lora.values())
    )
