"""A base in PyTorch, loaded once, for one adapter after another.

PEFT puts its layers into the modules of the model that it is given. Each adapter gets modules of its own, and
parameters of its own that share the loaded tensors' memory: to replace a parameter's value changes no other adapter's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch


class SharedBases:
    """Loaded bases by dtype and size of head; the one asked for last is kept."""

    def __init__(self) -> None:
        self._key: object = None
        self._model: torch.nn.Module | None = None

    def model(self, key: object, load: Callable[[], torch.nn.Module]) -> torch.nn.Module:
        """Modules of their own over the tensors of the base `key`, which `load` gives if it is not kept."""
        if key != self._key or self._model is None:
            self._model = None  # before the next is loaded
            self._model, self._key = load(), key
        return with_modules_of_its_own(self._model)


def with_modules_of_its_own(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of `model` whose tensors share memory with the original's; tied ones stay tied."""
    shared: dict[int, torch.Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        shared[id(tensor)] = torch.nn.Parameter(tensor.data, requires_grad=False) if is_parameter else tensor
    return copy.deepcopy(model, shared)
