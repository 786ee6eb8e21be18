"""The stack of alike layers of a weightless model, and the model with few of them, which is traced in its place.

Layers are alike if they differ in nothing but their number: the same modules, shapes, options and computed buffers.
The first may differ. What a layer computes from its number shows in the trace, where the copies are compared.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

# A first, two that are compared and of which the others are copies, and a last.
N_TRACED = 4


@dataclass(frozen=True)
class Stack:
    """The layers `<path>.0` to `<path>.<n_layers - 1>` of a model."""

    path: str
    n_layers: int


def alike_layers(model: torch.nn.Module) -> Stack | None:
    """The one stack of a model's layers, if it has more than `N_TRACED` and all but the first are alike; else None."""
    config = model.config.get_text_config()
    n_layers = getattr(config, "num_hidden_layers", None)
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) > 1
    ]
    # Lists inside layers, such as experts, are looked at with them.
    outer = [(name, m) for name, m in stacks if not any(name.startswith(f"{other}.") for other, _ in stacks)]
    if len(outer) != 1 or len(outer[0][1]) != n_layers or n_layers <= N_TRACED:
        return None
    path, layers = outer[0]
    are_alike = all(_is_alike(layers[1], 1, layers[i], other_at=i) for i in range(2, n_layers))
    return Stack(path, n_layers) if are_alike else None


def is_deep(model: torch.nn.Module) -> bool:
    """Whether a model has more layers than are traced where they are alike."""
    return (getattr(model.config.get_text_config(), "num_hidden_layers", None) or 0) > N_TRACED


def _is_alike(one: torch.nn.Module, at: int, other: torch.nn.Module, *, other_at: int) -> bool:
    if type(one) is not type(other) or one._modules.keys() != other._modules.keys():
        return False
    if not _are_equal_tensors(one._parameters, other._parameters) or not _are_equal_buffers(one, other):
        return False
    options, others = (
        {name: value for name, value in vars(module).items() if not name.startswith("_")} for module in (one, other)
    )
    if options.keys() != others.keys():
        return False
    for name, value in options.items():
        is_number = value == at and others[name] == other_at if type(value) is int else False
        if not is_number and not _is_equal(value, others[name]):
            return False
    parts = ((one._modules[name], other._modules[name]) for name in one._modules)
    return all(a is b or (a is not None and b is not None and _is_alike(a, at, b, other_at=other_at)) for a, b in parts)


def _is_equal(one: object, other: object) -> bool:
    """Whether two options are one, or equal plain values; anything else may differ in what it holds."""
    if isinstance(one, functools.partial) and isinstance(other, functools.partial):
        return (one.func, one.args, one.keywords) == (other.func, other.args, other.keywords)
    plain = bool | int | float | str | tuple | list | dict | torch.dtype
    return one is other or (type(one) is type(other) and isinstance(one, plain) and one == other)


def _are_equal_tensors(one: dict, other: dict) -> bool:
    def described(tensors: dict) -> dict:
        return {name: None if t is None else (t.shape, t.dtype) for name, t in tensors.items()}

    return described(one) == described(other)


def _are_equal_buffers(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    if not _are_equal_tensors(one._buffers, other._buffers):
        return False
    computed = one._non_persistent_buffers_set
    return computed == other._non_persistent_buffers_set and all(
        torch.equal(one._buffers[name], other._buffers[name]) for name in computed if one._buffers[name] is not None
    )


@contextlib.contextmanager
def shortened(model: torch.nn.Module, stack: Stack) -> Iterator[torch.nn.Module]:
    """`model` with the first `N_TRACED` layers of `stack` only, until the end of the block."""
    parent, _, name = stack.path.rpartition(".")
    holder, layers = model.get_submodule(parent), model.get_submodule(stack.path)
    config = model.config.get_text_config()
    number = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    before = dict(vars(config))
    # Not by assignment: a config checks the length of its lists against the number of layers.
    for option, value in before.items():
        if isinstance(value, list | tuple) and len(value) == stack.n_layers:
            vars(config)[option] = value[:N_TRACED]
    vars(config)[number] = N_TRACED
    holder._modules[name] = torch.nn.ModuleList(list(layers)[:N_TRACED])
    try:
        yield model
    finally:
        holder._modules[name] = layers
        vars(config).update(before)
