"""What adapters do to one parameter of the base, and their weighted sum: `W0 + Σ w·(f(W0) − W0)`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from lora_export.adapters.factors import Adapter, LoraFactors, TokenRows, fold, fold_dora

Read = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Change:
    """What one adapter does to one parameter.

    Attributes:
        weight: The adapter's weight in the sum.
        pair: A plain pair, whose delta is added a block at a time; None where `function` says it.
        function: The parameter after the adapter, float32, from the base's, in the same layout.
    """

    weight: float
    pair: LoraFactors | None = None
    function: Callable[[torch.Tensor], torch.Tensor] | None = None


def change_of(adapter: Adapter, weight: float, path: str, *, read: Read) -> Change | None:
    """What `adapter`, with `weight` in the sum, does to the parameter at `path`; None if nothing.

    Args:
        read: Reads a parameter of the base by path, for layers that change several together.
    """
    module, _, name = path.rpartition(".")
    pair = adapter.pairs.get(module) if name == "weight" else None
    steps: list[Callable[[torch.Tensor], torch.Tensor]] = []
    if path in adapter.replaced:
        steps.append(lambda _: adapter.replaced[path].float())
    if pair is not None and pair.magnitude is None and not steps:
        return Change(weight, pair=pair)
    if pair is not None:
        steps.append(lambda w: fold(w, [pair], torch.float32) if pair.magnitude is None else fold_dora(w, pair))
    own = adapter.pairs.get(module)
    if name == "bias" and own is not None and own.bias is not None:
        steps.append(lambda b: b.float() + own.scale * own.bias.float())
    if path in adapter.token_rows:
        steps.append(lambda w: with_rows(w, adapter.token_rows[path]))
    for layer_module, layer in adapter.layers.items():
        if path.startswith(f"{layer_module}.") and path.removeprefix(f"{layer_module}.") in layer.parameters:
            steps.append(lambda w, m=layer_module, each=layer: _merged(m, each, path, own=w, read=read))
    return Change(weight, function=_in_turn(steps)) if steps else None


def _in_turn(steps: Sequence[Callable[[torch.Tensor], torch.Tensor]]) -> Callable[[torch.Tensor], torch.Tensor]:
    def apply(tensor: torch.Tensor) -> torch.Tensor:
        for step in steps:
            tensor = step(tensor)
        return tensor

    return apply


def _merged(module: str, layer, path: str, *, own: torch.Tensor, read: Read) -> torch.Tensor:
    paths = {name: f"{module}.{name}" for name in layer.parameters}
    base = {name: own if other == path else read(other) for name, other in paths.items()}
    return layer.merged(base)[path.removeprefix(f"{module}.")]


def with_rows(weight: torch.Tensor, rows: TokenRows) -> torch.Tensor:
    """An embedding's `weight` `[vocabulary, dim]` with its rows at `rows.indices` replaced, float32."""
    return weight.to(torch.float32, copy=True).index_copy_(0, rows.indices, rows.rows.float())


def apply_changes(
    weight: torch.Tensor, changes: Sequence[Change], dtype: torch.dtype, *, transposed: bool = False
) -> torch.Tensor:
    """`weight` with `changes` made to it, summed in float32, rounded once to `dtype`.

    Args:
        weight: The base's parameter, left as it was.
        transposed: Give a matrix transposed, C-contiguous.
    """
    pairs = [replace(change.pair, scale=change.pair.scale * change.weight) for change in changes if change.pair]
    others = [change for change in changes if change.function]
    is_copy = transposed and weight.ndim == 2
    if len(others) == 1 and others[0].weight == 1:
        weight = others[0].function(weight)
    elif others:
        base, weight = weight.float(), weight.to(torch.float32, copy=True)
        for change in others:
            weight += change.weight * (change.function(base) - base)
    if is_copy:  # first, so that the pairs are folded into the copy
        weight = weight.T.clone(memory_format=torch.contiguous_format)
        pairs = [replace(pair, weight_is_in_out=not pair.weight_is_in_out) for pair in pairs]
    return fold(weight, pairs, dtype, in_place=is_copy) if weight.is_floating_point() else weight
