"""A trained adapter as values, and its mathematics on one page.

Source: Hu et al., LoRA (arXiv 2106.09685), section 4.1, `h = W0 x + ΔW x` with `ΔW = s·B·A`, `s = α/r`; Kalajdzievski,
rsLoRA (arXiv 2312.03732), `s = α/√r`. PEFT's files hold A as `[rank, in_features]` and B as `[out_features, rank]`.
All sums are taken in float32 and rounded once, to the dtype that is stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

# Rows folded at a time: the float32 sum of a block stays in the processor's cache, and never exists for a whole weight.
_FOLD_ROWS = 256


@dataclass(frozen=True)
class LoraFactors:
    """The pair of one module.

    Attributes:
        module: The module's path in the base model.
        a: `[rank, in_features]`.
        b: `[out_features, rank]`.
        scale: `s`, as PEFT resolved it for this module.
        weight_is_in_out: True if the base's weight is stored `[in_features, out_features]` (GPT-2's Conv1D).
    """

    module: str
    a: torch.Tensor
    b: torch.Tensor
    scale: float
    weight_is_in_out: bool

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class Adapter:
    """A trained adapter, resolved on its base.

    Attributes:
        name: The name it is served under.
        lora: Pairs by module path.
        replaced: Whole tensors of `modules_to_save`, by parameter path (`classifier.weight`).
        replaced_modules: The Linear modules among them, `[out, in]` weights, by path.
        config: Its `adapter_config.json`.
        base_copies: What the file also holds of the base, by parameter path: PEFT saves the weight of an adapted
            embedding or `lm_head` beside the pair.
    """

    name: str
    lora: Mapping[str, LoraFactors]
    replaced: Mapping[str, torch.Tensor]
    replaced_modules: tuple[str, ...]
    config: Mapping[str, object]
    base_copies: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({pair.rank for pair in self.lora.values()}))


def delta(pair: LoraFactors) -> torch.Tensor:
    """`ΔW = s·B·A` in float32, in the layout of the base's weight (`[out, in]`, or `[in, out]` for Conv1D)."""
    product = (pair.b.float() * pair.scale) @ pair.a.float()
    return product.T if pair.weight_is_in_out else product


def fold(
    weight: torch.Tensor, pairs: Sequence[LoraFactors], dtype: torch.dtype, *, in_place: bool = False
) -> torch.Tensor:
    """`W0 + Σ s·B·A`, summed in float32, rounded once to `dtype`.

    Args:
        in_place: Overwrite `weight` if it has that dtype; otherwise it is left as it was.
    """
    if not pairs:
        return weight.to(dtype)
    factors = [
        (pair.a.T.float(), pair.b.T.float(), pair.scale)
        if pair.weight_is_in_out
        else (pair.b.float(), pair.a.float(), pair.scale)
        for pair in pairs
    ]
    folded = weight if in_place and weight.dtype is dtype else torch.empty(weight.shape, dtype=dtype)
    for start in range(0, len(weight), _FOLD_ROWS):
        rows = slice(start, start + _FOLD_ROWS)
        total = weight[rows].to(torch.float32, copy=True)
        for left, right, scale in factors:
            total.addmm_(left[rows], right, alpha=scale)
        folded[rows] = total
    return folded


def served_pair(pair: LoraFactors, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The pair as a dynamic graph takes it: A `[1, in, rank]`, B `[1, rank, out]` with the scale folded in.

    `y += (x A) B`, so A is PEFT's transposed, and so is B; the scale is applied in float32 before the one rounding.
    """
    a = pair.a.float().T.unsqueeze(0)
    b = (pair.b.float() * pair.scale).T.unsqueeze(0)
    return a.to(dtype).contiguous(), b.to(dtype).contiguous()
