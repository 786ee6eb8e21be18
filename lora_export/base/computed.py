"""Tensors that a model computes: the sinusoidal positions of Marian, Pegasus, M2M100, NLLB, XGLM.

1. A parameter that a checkpoint may lack, as `from_pretrained` gives it its first value again (Marian, Pegasus; the
   bias of zeros on Bart's logits).
2. A table that is no parameter and that the model makes anew when a longer text comes (M2M100, XGLM): a graph has the
   table of the config's size.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator

import torch

# Beyond every axis of a trace (`Dim.max`), so that no text is longer than the table.
_NEVER_REACHED = 2**40


def computed_parameters(model: torch.nn.Module, missing: Iterable[str]) -> dict[str, torch.Tensor]:
    """Those of `missing` that are computed, in float32, by path.

    A tensor is computed if training never changes it or Transformers does not mind that it is missing, and if it gets
    the same first value each time. Other missing tensors, such as a head, would get random numbers.

    Args:
        model: Weightless; it is left as it was.
        missing: Paths of parameters and persistent buffers that the checkpoint lacks.
    """
    missing = list(missing)
    if not missing:
        return {}
    with torch.device("meta"):
        fresh = type(model)._from_config(model.config, dtype=torch.float32)
    ignored = [re.compile(pattern) for pattern in fresh._keys_to_ignore_on_load_missing or ()]
    frozen = {path for path, parameter in fresh.named_parameters() if not parameter.requires_grad}
    found = {}
    for path in missing:
        if path in frozen or any(pattern.search(path) for pattern in ignored):
            first, second = (_first_value(fresh, path, seed) for seed in (0, 1))
            if torch.equal(first, second):
                found[path] = first
    return found


def _first_value(fresh: torch.nn.Module, path: str, seed: int) -> torch.Tensor:
    """What Transformers initializes the tensor at `path` to; `fresh` is on the meta device, and that module no more."""
    module_path, _, name = path.rpartition(".")
    module, initialize = fresh.get_submodule(module_path), fresh._init_weights
    for ancestor, candidate in fresh.named_modules():
        if hasattr(candidate, "_init_weights") and f"{module_path}.".startswith(f"{ancestor}." if ancestor else ""):
            initialize = candidate._init_weights
    nan = torch.full(module.get_buffer(name).shape if name in module._buffers else module.get_parameter(name).shape,
                     torch.nan)  # fmt: skip
    if name in module._buffers:
        module._buffers[name] = nan
    else:
        module._parameters[name] = torch.nn.Parameter(nan, requires_grad=False)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        initialize(module)
    return getattr(module, name).detach()


class _Table:
    """A table of positions that says it is longer than any text."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def size(self, axis: int) -> int:
        return _NEVER_REACHED if axis == 0 else self._tensor.size(axis)

    def __getattr__(self, name: str) -> object:
        return getattr(self._tensor, name)


@contextlib.contextmanager
def tables_of_fixed_size(model: torch.nn.Module) -> Iterator[None]:
    """While a model is traced: its tables are not made anew for longer texts, which would be a branch on a length."""
    growing = [module for module in model.modules() if hasattr(module, "make_weights") and "weights" in module._buffers]
    tables = [module._buffers.pop("weights") for module in growing]
    for module, table in zip(growing, tables, strict=True):
        module.__dict__["weights"] = _Table(table)
    try:
        yield
    finally:
        for module, table in zip(growing, tables, strict=True):
            del module.__dict__["weights"]
            module._buffers["weights"] = table
