"""A base in PyTorch, loaded once, for one adapter after another.

PEFT puts its layers into the modules of the model that it is given. So each adapter gets modules and parameters of its
own. The parameters share the memory of the loaded tensors: replacing one changes no other adapter's model. But PEFT
writes the biases and embeddings of an adapter's file into the base's memory. Such a base is loaded again for the next
adapter.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

from lora_export.compat import borrow


class SharedBases:
    """Loaded bases by dtype and size of head; the one asked for last is kept."""

    def __init__(self) -> None:
        self._key: object = None
        self._model: torch.nn.Module | None = None
        self._lent: list[torch.Tensor] = []

    def model(self, key: object, load: Callable[[], torch.nn.Module]) -> torch.nn.Module:
        """Modules of their own over the tensors of the base `key`, which `load` gives if it is not kept."""
        n_writes = borrow("_version").__get__  # of a tensor, from 0
        if key != self._key or self._model is None or any(map(n_writes, self._lent)):
            self._model, self._lent = None, []  # before the next is loaded
            self._model, self._key = load(), key
        shared: dict[int, torch.Tensor] = {}
        for tensor in (*self._model.parameters(), *self._model.buffers()):
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            lent = torch.nn.Parameter(tensor.data, requires_grad=False) if is_parameter else tensor.data
            shared[id(tensor)] = lent
        self._lent = list(shared.values())
        return copy.deepcopy(self._model, shared)
