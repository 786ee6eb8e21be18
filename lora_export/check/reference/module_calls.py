"""What every module of the reference is given and gives in one run, by hooks; of one module, every operation's result.

A path is that in the base: PEFT's wrappers stand for the module that they wrap, and what they hold inside are its
parts: "base" (before the adapter), "lora_A" and "lora_B" (scaled).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from lora_export.base.weightless import as_numpy, is_conv1d
from lora_export.check.judge.measures import ENOUGH
from lora_export.compat import borrow

WHOLE, BASE, LORA_A, LORA_B = "output", "base", "lora_A", "lora_B"
_PREFIX = "base_model.model."
_WRAPPED = re.compile(r"\.(modules_to_save\.[^.]+|original_module|token_adapter)(?=\.|$)")
_PART = re.compile(r"^(?P<module>.*)\.(?P<part>base_layer|lora_A\.[^.]+|lora_B\.[^.]+)$")
_INSIDE = re.compile(r"\.(base_layer|lora_[^.]+)(\..*)?$")
# Values of init_lora_weights that leave the base's weights as they are.
_STARTS_BESIDE_THE_BASE = ("gaussian", "eva", "orthogonal")
# Softmax and its like give one result; more of a huge module would not fit.
_MOST_RESULTS = 20_000


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module.

    Attributes:
        part: What of the module: its output, or a part of an adapted one.
        caller: The module that called it; "" for the model itself.
        input: Its first tensor, None if it has none.
        input_from: The module that computed its input.
        output: Its first floating tensor.
        bias: Its bias, `[out]`, for a graph that adds it later.
        weight: Identity of its weight: equal for tied modules.
        is_lookup: Whether it is an embedding.
        terms: Of a linear map to few features, the size of the terms that one number of its output is the sum of: the
            largest `√(Σ x² w² + b²)`. None for any other.
    """

    module: str
    part: str
    caller: str
    input: np.ndarray | None
    input_from: str
    output: np.ndarray
    bias: np.ndarray | None = None
    weight: int | None = None
    is_lookup: bool = False
    terms: float | None = None


@dataclass
class Recording:
    """What a run left behind.

    Attributes:
        calls: In the order in which they ended.
        results: Of the operations of the module `within`.
        views: Of those of its operations that only arrange numbers.
    """

    calls: list[ModuleCall] = field(default_factory=list)
    results: list[np.ndarray] = field(default_factory=list)
    views: list[np.ndarray] = field(default_factory=list)


@contextlib.contextmanager
def recorded(model: torch.nn.Module, within: str | None = None) -> Iterator[Recording]:
    """Record the runs of `model` inside the block.

    Args:
        within: The path of a module whose operations' floating results are recorded, in place of the calls.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = Recording()
    layers = {_path(name) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    observer = _Observer(found, within, _scales(model), layers=layers)
    handles = []
    for name, module in model.named_modules():
        path = _path(name)
        handles.append(module.register_forward_pre_hook(observer.before(path), with_kwargs=True))
        handles.append(module.register_forward_hook(observer.after(path), always_call=True))
    results = _Results(observer) if within is not None else contextlib.nullcontext()
    try:
        with results:
            yield found
    finally:
        for handle in handles:
            handle.remove()


def _path(name: str) -> str:
    """The path in the base of a module of PEFT's model; "" for the model itself and what PEFT wraps it in."""
    return "" if f"{name}." in (_PREFIX, "base_model.") else _WRAPPED.sub("", name.removeprefix(_PREFIX))


class _Observer:
    """Follows the calls of a run; tensors are told apart by where they lie, so they are kept until it is over."""

    def __init__(self, found: Recording, within: str | None, scales: dict[int, float], *, layers: set[str]) -> None:
        self.found, self.within, self._scales, self._layers = found, within, scales, layers
        self._stack: list[tuple[str, torch.Tensor | None, str]] = []
        self._made_by: dict[tuple, str] = {}
        self._kept: list[torch.Tensor] = []

    @property
    def is_within(self) -> bool:
        """Whether an operation is one of the module's; of the model itself, those of no module inside it."""
        paths = [path for path, _, _ in self._stack]
        return self.within in paths if self.within else paths[-1:] == [""]

    def before(self, path: str):
        def hook(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
            tensors = list(_tensors((*args, *kwargs.values())))
            caller = self._stack[-1][0] if self._stack else ""
            for tensor in tensors:
                if _key(tensor) not in self._made_by:
                    self._keep(tensor, caller)
            first = tensors[0] if tensors else None
            self._stack.append((path, first, "" if first is None else self._made_by[_key(first)]))

        return hook

    def after(self, path: str):
        def hook(module: torch.nn.Module, args: tuple, output: object) -> None:
            _, given, given_by = self._stack.pop()
            made = [tensor for tensor in _tensors(_values(output)) if tensor.is_floating_point()]
            for tensor in made:
                if _key(tensor) not in self._made_by:
                    self._keep(tensor, path)
            caller = self._stack[-1][0] if self._stack else ""
            if made and self.within is None and caller != path:
                self._record(path, module, caller, given=given, given_by=given_by, made=made[0])

        return hook

    def _record(self, path: str, module, caller: str, *, given, given_by: str, made: torch.Tensor) -> None:
        part, inside, scale = WHOLE, _PART.match(path), 1.0
        if inside:
            path, part = inside["module"], inside["part"].partition(".")[0].replace("base_layer", BASE)
            if _PART.match(path):
                return  # a wrapper within a wrapper
            if part in (LORA_A, LORA_B):
                if id(module) not in self._scales:
                    return
                scale = self._scales[id(module)] if part == LORA_B else 1.0
        elif any(path.startswith(f"{layer}.") for layer in self._layers):
            return  # what a tuner has inside: a gain, a rotation
        base = _wrapped(module)
        bias, weight = getattr(base, "bias", None), getattr(base, "weight", None)
        self.found.calls.append(
            ModuleCall(
                path,
                part,
                caller,
                None if given is None else _copy(given),
                given_by,
                _copy(made if scale == 1 else made * scale),
                _copy(bias) if isinstance(bias, torch.Tensor) and bias.ndim == 1 else None,
                weight.data_ptr() if isinstance(weight, torch.Tensor) else None,
                isinstance(base, torch.nn.Embedding),
                _size_of_terms(base, given, scale),
            )
        )

    def _keep(self, tensor: torch.Tensor, path: str) -> None:
        self._made_by[_key(tensor)] = _INSIDE.sub("", path)
        self._kept.append(tensor)


def _size_of_terms(module: torch.nn.Module, given: torch.Tensor | None, scale: float) -> float | None:
    """`ModuleCall.terms` of what `module` computes of `given` `[…, in]`, times `scale`."""
    weight = _out_in_weight(module)
    if weight is None or given is None or weight.shape[0] >= ENOUGH or given.shape[-1] != weight.shape[1]:
        return None
    squares = given.detach().float().square() @ weight.float().square().T
    if isinstance(module.bias, torch.Tensor):
        squares = squares + module.bias.float().square()
    return scale * float(squares.amax().sqrt())


def _out_in_weight(module: torch.nn.Module) -> torch.Tensor | None:
    """The weight of a linear map, `[out, in]`; None of any other module."""
    if isinstance(module, torch.nn.Linear):
        return module.weight.detach()
    return module.weight.detach().T if is_conv1d(module) else None


def _wrapped(module: torch.nn.Module) -> torch.nn.Module:
    """What computes a module that PEFT has wrapped: its own layer, or the one that an adapter brings whole."""
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    if isinstance(module, ModulesToSaveWrapper):
        active = [name for name in module.active_adapters if name in module.modules_to_save]
        return module.modules_to_save[active[0]] if active and not module.disable_adapters else module.original_module
    if isinstance(module, AuxiliaryTrainingWrapper):
        return module.original_module
    return getattr(module, "base_layer", module)


def _scales(model: torch.nn.Module) -> dict[int, float]:
    """The scale of each pair's A and B, by identity; only of pairs that a graph holds as they are: not with a gain, a
    gate or a bias of B, and not where the start of training changed the base, so that they are taken against another.
    """
    from peft.tuners.lora import LoraLayer

    configs = next((module.peft_config for module in model.modules() if hasattr(module, "peft_config")), {})
    found: dict[int, float] = {}
    for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
        active = [name for name in layer.active_adapters if name in layer.scaling]
        if len(active) != 1 or layer.lora_variant.get(active[0]) or layer.lora_bias.get(active[0]):
            continue
        name = active[0]
        start = getattr(configs.get(name), "init_lora_weights", True)
        if isinstance(start, bool) or start in _STARTS_BESIDE_THE_BASE:
            found |= {id(pair[name]): layer.scaling[name] for pair in (layer.lora_A, layer.lora_B) if name in pair}
    return found


class _Results(borrow("TorchDispatchMode")):
    """Records the floating results of the operations of one module."""

    def __init__(self, observer: _Observer) -> None:
        super().__init__()
        self._observer = observer

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        found, views = self._observer.found.results, self._observer.found.views
        if self._observer.is_within and len(found) < _MOST_RESULTS:
            given = {tensor.data_ptr() for tensor in _tensors(tuple(args))}
            made = [t for t in _tensors(_values(result)) if t.is_floating_point() and t.ndim]
            for tensor in made:
                # A view is the same numbers once more.
                (views if tensor.data_ptr() in given else found).append(_copy(tensor))
        return result


def _values(output: object) -> tuple:
    if isinstance(output, dict):
        return tuple(output.values())
    return tuple(output) if isinstance(output, tuple | list) else (output,)


def _tensors(values: tuple) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(tuple(value))


def _key(tensor: torch.Tensor) -> tuple:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.dtype


def _copy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach()
    return as_numpy(tensor.float().clone() if tensor.is_floating_point() else tensor.clone())
