"""The base of a quantized export in PyTorch: its linear maps multiply by what the file says.

Where the graph lets `MatMulNBits` round its other operand to 8-bit integers, PyTorch can do the same. Each block of the
operand has a step, its largest number over 127, and its elements are rounded to multiples of the step: with a largest
number of 2.54 to multiples of 0.02.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lora_export.base.weightless import is_conv1d
from lora_export.errors import InputRefused
from lora_export.graph.stored_integers import StoredInteger, stored_integers, stored_tables

_INT8_MOST = 127


@dataclass
class Switch:
    """Whether the linear maps that hold it round what they are given."""

    is_on: bool = False


@dataclass(frozen=True)
class IntegerBase:
    """The quantized weights of an export.

    Attributes:
        graphs: The files of its graphs.
        is_merged: Whether adapters were folded in before they were quantized.
    """

    graphs: tuple[Path, ...]
    is_merged: bool
    switch: Switch = field(default_factory=Switch)

    def stored(self, model: torch.nn.Module) -> Iterator[StoredInteger]:
        """Each quantized parameter of `model` in every graph, one at a time.

        Raises:
            InputRefused: The file has a weight that is no linear map of the model, or not of its size.
        """
        for graph in self.graphs:
            for packed in stored_integers(graph):
                modules = [_linear_of(model, path, graph) for path in packed.parameters]
                sizes = [_out_in(module)[0] for module in modules]
                if packed.integers.shape != (sum(sizes), _out_in(modules[0])[1]):
                    _refuse(graph, packed.parameters, f"{list(packed.integers.shape)}, {sizes} rows in the base")
                yield from packed.apart(sizes)

    def put_in(self, model: torch.nn.Module) -> torch.nn.Module:
        """`model` (changed in place) whose linear maps multiply by the stored weights, in its own dtype.

        A linear map that is tied to one that is stored gets its numbers too. An embedding stays as it is, but where the
        graph looks it up as integers.
        """
        for graph in self.graphs:
            for table in stored_tables(graph):
                (path,) = table.parameters
                module = model.get_submodule(path.removesuffix(".weight"))
                values = torch.from_numpy(table.values).to(module.weight.dtype)
                module.weight = torch.nn.Parameter(values, requires_grad=False)
        done: set[str] = set()
        groups = _tied_linears(model)
        for stored in self.stored(model):
            (path,) = stored.parameters
            if path in done:
                continue
            values = torch.from_numpy(stored.values)
            for name in groups[path]:
                module = model.get_submodule(name.rpartition(".")[0])
                new = (values.T.contiguous() if is_conv1d(module) else values).to(module.weight.dtype)
                module.weight = torch.nn.Parameter(new, requires_grad=False)
                module.register_forward_pre_hook(_rounding(self.switch, stored.block_size))
                done.add(name)
        return model


def _tied_linears(model: torch.nn.Module) -> dict[str, list[str]]:
    """The linear weights that are one tensor, by the path of each of them, itself first."""
    by_tensor: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) or is_conv1d(module):
            by_tensor.setdefault(id(module.weight), []).append(f"{name}.weight")
    return {path: [path, *(p for p in paths if p != path)] for paths in by_tensor.values() for path in paths}


def linear_weight(model: torch.nn.Module, path: str) -> torch.Tensor:
    """The weight of a linear map of `model`, `[out, in]`."""
    module = model.get_submodule(path.rpartition(".")[0])
    return module.weight.detach().T if is_conv1d(module) else module.weight.detach()


def _linear_of(model: torch.nn.Module, path: str, graph: Path) -> torch.nn.Module:
    try:
        module = model.get_submodule(path.rpartition(".")[0])
    except AttributeError:
        module = None
    if not (isinstance(module, torch.nn.Linear) or is_conv1d(module)):
        _refuse(graph, (path,), "no linear map of the base")
    return module


def _out_in(module: torch.nn.Module) -> tuple[int, int]:
    shape = tuple(module.weight.shape)
    return shape[::-1] if is_conv1d(module) else shape


def _refuse(graph: Path, paths: Sequence[str], found: str) -> None:
    raise InputRefused(
        "A quantized weight of the graph is not one of its base",
        where=f"{graph}: {', '.join(paths)}",
        expected="a linear map of the base, of its size",
        found=found,
        next_step="export again, or name the base that it was made from with --base",
    )


def _rounding(switch: Switch, block_size: int):
    def hook(module: torch.nn.Module, args: tuple) -> tuple | None:
        return (rounded(args[0], block_size), *args[1:]) if switch.is_on else None

    return hook


def rounded(x: torch.Tensor, block_size: int) -> torch.Tensor:
    """`x` `[…, in]` with the numbers of each block rounded to multiples of its largest over 127."""
    padding = -x.shape[-1] % block_size
    blocks = torch.nn.functional.pad(x, (0, padding)).unflatten(-1, (-1, block_size))
    step = blocks.abs().amax(dim=-1, keepdim=True) / _INT8_MOST
    whole = torch.where(step > 0, torch.round(blocks / torch.where(step > 0, step, 1)), 0)
    return (whole * step).flatten(-2)[..., : x.shape[-1]]
