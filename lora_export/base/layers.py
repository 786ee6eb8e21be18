"""The stacks of alike layers of a weightless model, and the model with few of them, which is traced in its place.

Layers are alike if they differ in nothing but their number: the same modules, shapes, options, computed buffers and
entries of the config's lists. The first ones may differ, and after them kinds may take turns: sliding windows in all
but every sixth layer (Gemma 3). What a layer computes from its number shows in the trace, where copies are compared.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from lora_export.base.forward import is_dual_encoder
from lora_export.base.tasks import is_multimodal

# Up to so many layers, there is nothing to copy: a first, two that are compared, and a last.
MOST_TRACED = 4
# What configs and modules call the number of their layers.
_NUMBER = re.compile(r"(num_|n_)?((hidden|encoder|decoder)_)?layers?|depth")


@dataclass(frozen=True)
class Stack:
    """The layers `<path>.0` to `<path>.<n_layers - 1>` of a model, each as the one `period` before it, but the first.

    A model has few of them when it is traced: the first `n_first`, two periods, of which the second is copied, and the
    last `n_last`. Example: of 26 layers in which every sixth differs, 1 + 2 · 6 + 1.
    """

    path: str
    n_layers: int
    n_first: int = 1
    period: int = 1

    @property
    def n_last(self) -> int:
        return 1 + (self.n_layers - self.n_first - 1) % self.period

    @property
    def n_traced(self) -> int:
        return self.n_first + 2 * self.period + self.n_last

    @property
    def copies(self) -> range:
        """How far above the second period's layers those of each of its copies are."""
        return range(self.period, self.n_layers - self.n_traced + 1, self.period)

    @property
    def is_worth_it(self) -> bool:
        return len(self.copies) > 0

    def wider(self) -> list[Stack]:
        """What to try where layers differ: the same with two of them a period, for layers that read what the one before
        the last gave; none if that is tried, or there is nothing to copy."""
        other = replace(self, n_first=self.n_first + 1, period=2)
        return [other] if self.period == 1 and other.is_worth_it else []


def alike_stacks(model: torch.nn.Module) -> tuple[Stack, ...]:
    """The stacks of a model's layers that can be copied from one another; those with nothing to copy are left out.

    A model of several is an encoder-decoder, a dual encoder or multimodal, or one in which no layer is read by its
    number, as the backbones of segmentation are.
    """
    lists = _outer_lists(model)
    is_of_several = model.config.is_encoder_decoder or is_dual_encoder(model) or is_multimodal(type(model).__name__)
    reads_by_number = any("indices" in name and value for name, value in vars(model.config).items())
    if len(lists) > 1 and reads_by_number and not is_of_several:
        return ()
    stacks = [_stack(model, path, layers) for path, layers in lists]
    return tuple(stack for stack in stacks if stack is not None)


def deep_paths(model: torch.nn.Module) -> tuple[str, ...]:
    """The paths of a model's lists of more layers than are traced where they are alike."""
    return tuple(path for path, layers in _outer_lists(model) if len(layers) > MOST_TRACED and _counted(model, path))


def repeats_one(model: torch.nn.Module) -> bool:
    """Whether a model runs one layer more often than layers are traced where they are alike (ALBERT)."""
    n_layers = getattr(model.config.get_text_config(), "num_hidden_layers", None) or 0
    return n_layers > MOST_TRACED and not deep_paths(model)


def _outer_lists(model: torch.nn.Module) -> list[tuple[str, torch.nn.ModuleList]]:
    """A model's lists of modules by path; lists inside layers, such as experts, are looked at with them."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) > 1
    ]
    return [(name, each) for name, each in lists if not any(name.startswith(f"{other}.") for other, _ in lists)]


def _stack(model: torch.nn.Module, path: str, layers: torch.nn.ModuleList) -> Stack | None:
    n_layers = len(layers)
    if n_layers <= MOST_TRACED or not _counted(model, path):
        return None
    lists = [value for options in _holders(model, path) for value in options.values() if _is_list(value, n_layers)]
    kinds: list[int] = []  # the number of the first layer that each is like
    for at, layer in enumerate(layers):
        like = (
            first
            for first in dict.fromkeys(kinds)
            if all(each[first] == each[at] for each in lists) and _is_alike(layers[first], first, layer, other_at=at)
        )
        kinds.append(next(like, at))
    found = [Stack(path, n_layers, _n_first(kinds, period), period) for period in range(1, n_layers // 2)]
    return min((stack for stack in found if stack.is_worth_it), key=lambda stack: stack.n_traced, default=None)


def _n_first(kinds: Sequence[int], period: int) -> int:
    """How many of `kinds` there are, one at least, before each is what the one `period` before it is."""
    n_first = len(kinds) - period
    while n_first > 1 and kinds[n_first - 1] == kinds[n_first - 1 + period]:
        n_first -= 1
    return n_first


def _is_list(value: object, length: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == length


def _counted(model: torch.nn.Module, path: str) -> list[tuple[dict, list[str]]]:
    """The options of what counts the layers at `path`, each with the names of the numbers among them.

    Where a config counts the layers of an encoder and of a decoder, those of the other are not meant.
    """
    n_layers = len(model.get_submodule(path))
    other = "encoder" if "decoder" in path else "decoder"

    def counts(name: str, value: object) -> bool:
        is_meant = other not in name or other in path
        return _NUMBER.fullmatch(name) is not None and type(value) is int and value == n_layers and is_meant

    found = [(each, [name for name, value in each.items() if counts(name, value)]) for each in _holders(model, path)]
    return [(options, names) for options, names in found if names]


def _holders(model: torch.nn.Module, path: str) -> list[dict]:
    """The options of the modules that hold the layers at `path`, and of the config of the innermost.

    Of an encoder-decoder also those of the whole's config, which is where the numbers of both stand.
    """
    names = path.split(".")[:-1]
    modules = [model.get_submodule(".".join(names[:n])) for n in range(len(names), -1, -1)]
    configs = [module.config for module in modules if getattr(module, "config", None) is not None]
    configs = configs[:1] + (configs[-1:] if model.config.is_encoder_decoder and configs[0] is not configs[-1] else [])
    return [vars(each) for each in (*modules, *configs)]


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
def shortened(model: torch.nn.Module, stacks: Sequence[Stack]) -> Iterator[torch.nn.Module]:
    """`model` with the first `n_traced` layers of each of `stacks` only, until the end of the block."""
    with contextlib.ExitStack() as until:
        for stack in stacks:
            until.enter_context(_shortened(model, stack))
        yield model


@contextlib.contextmanager
def _shortened(model: torch.nn.Module, stack: Stack) -> Iterator[None]:
    parent, _, name = stack.path.rpartition(".")
    parent_module, layers = model.get_submodule(parent), model.get_submodule(stack.path)
    numbers = _counted(model, stack.path)
    before = [(options, dict(options)) for options in _holders(model, stack.path)]
    # Not by assignment: a config checks the length of its lists against the number of layers.
    for options, were in before:
        options.update({name: each[: stack.n_traced] for name, each in were.items() if _is_list(each, stack.n_layers)})
    for options, names in numbers:
        options.update(dict.fromkeys(names, stack.n_traced))
    parent_module._modules[name] = torch.nn.ModuleList(list(layers)[: stack.n_traced])
    try:
        yield
    finally:
        parent_module._modules[name] = layers
        for options, were in before:
            options.update(were)
