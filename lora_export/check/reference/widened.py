"""A model in float64 that keeps its large weights in float32 and widens them as they are used.

A copy of the weights in float64 takes twice the bytes that they have in float32, which is most of what a check needs.
The products are the same: a weight's float32 is exact in float64.

1. A `Linear`, `Embedding` or `Conv1D` with a large weight computes in float64, part of the weight at a time.
2. All else, an adapter's own weights among it, is in float64.
3. What two models have in common in float32 is kept once: `share_weights`.
4. Where code casts what such a module is given to the dtype of its weight (T5), it comes in float32: `Narrowed` is
   raised, as numbers were lost. Then the whole model is widened.
"""

from __future__ import annotations

from functools import partial

import torch

from lora_export.base.weightless import is_conv1d

# Weights below it are copied: they are no bytes worth speaking of.
_LARGE = 1 << 18
_PART = 1 << 22
_WIDE = torch.float64


class Narrowed(Exception):
    """A module was given numbers of a narrower dtype than float64."""


def widened(model: torch.nn.Module) -> torch.nn.Module:
    """`model`, changed in place and returned, in float64 but for its large weights."""
    lazy = [
        module
        for name, module in model.named_modules()
        if _kind(module) and module.weight.numel() >= _LARGE and ".lora_" not in name
    ]
    kept = {id(module.weight) for module in lazy}
    for module in lazy:
        module.forward = partial(_FORWARDS[_kind(module)], module)
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None and tensor.is_floating_point() and id(tensor) not in kept:
                    tensor.data = tensor.data.to(_WIDE)
    return model


def share_weights(model: torch.nn.Module, other: torch.nn.Module) -> None:
    """Let each large weight of `model`, from `widened`, be that of `other` where all bits are equal.

    Args:
        other: The same modules in float32; left as it is, also when `model` is changed later.
    """
    twins, shared = dict(other.named_modules()), {}
    for name, module in model.named_modules():
        twin = twins.get(name)
        if not _computes_lazily(module) or type(twin) is not type(module):
            continue
        theirs = twin.weight
        if theirs.data_ptr() == module.weight.data_ptr():
            continue
        if theirs.dtype is module.weight.dtype and torch.equal(theirs, module.weight):
            # A parameter of its own on the same memory: `wholly_widened` must not reach the other's.
            own = shared.setdefault(id(theirs), torch.nn.Parameter(theirs.detach(), requires_grad=False))
            module.weight = own


def wholly_widened(model: torch.nn.Module) -> torch.nn.Module:
    """`model`, from `widened`, changed in place and returned, in float64 as a whole."""
    for module in filter(_computes_lazily, model.modules()):
        del module.forward
    return model.to(_WIDE)


def is_lazy(model: torch.nn.Module) -> bool:
    """Whether any weight of `model` is widened as it is used."""
    return any(map(_computes_lazily, model.modules()))


def _computes_lazily(module: torch.nn.Module) -> bool:
    return isinstance(module.__dict__.get("forward"), partial)


def _kind(module: torch.nn.Module) -> str | None:
    """What a module computes, if it is of one of these very classes and its weight is in float32."""
    plain = {torch.nn.Linear: "Linear", torch.nn.Embedding: "Embedding"}
    name = "Conv1D" if is_conv1d(module) else plain.get(type(module))
    return name if name is not None and module.weight.dtype is torch.float32 else None


def _linear(module: torch.nn.Module, states: torch.Tensor) -> torch.Tensor:
    _require_wide(states)
    rows = max(1, _PART // module.in_features)
    found = [states @ part.to(_WIDE).T for part in module.weight.split(rows)]
    product = found[0] if len(found) == 1 else torch.cat(found, dim=-1)
    return product if module.bias is None else product + module.bias


def _conv1d(module: torch.nn.Module, states: torch.Tensor) -> torch.Tensor:
    _require_wide(states)
    return states @ module.weight.to(_WIDE) + module.bias


def _embedding(module: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.embedding(ids, module.weight, module.padding_idx).to(_WIDE)


def _require_wide(states: torch.Tensor) -> None:
    if states.dtype is not _WIDE:
        raise Narrowed


_FORWARDS = {"Linear": _linear, "Conv1D": _conv1d, "Embedding": _embedding}
