"""What each measure is, of two sets of outputs over the same positions: its value, and its limit there. NumPy only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lora_export.check.judge import measures
from lora_export.check.judge.effect import EffectShare, effect_share
from lora_export.check.judge.measures import (
    blocks,
    largest_difference,
    mean_kl,
    output_scale,
    rms_difference,
    scale_of,
    scatter_of_ratio,
    top1_agreement,
)
from lora_export.check.judge.tolerances import Tolerances
from lora_export.check.results import BothSides, Rounding

# Two thirds of the limit are what sound exports have at the most where there are many positions; the rest is a margin
# for chance, beyond which few positions widen it.
_OF_THE_LIMIT = 0.65
_TINY = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True)
class Sides:
    """Two sets of outputs as the formulas take them: `[positions, n]`, the real positions only.

    Attributes:
        precise: The first positions as PyTorch computes them at a wider dtype; None if it did not.
        n_precise: How many positions those are, where several were flattened into one.
        without: The first positions in PyTorch without the adapter; None where there is no adapter.
        targets: Of a language model, the token that follows each position, `[positions]`, -1 for none.
        found_without: The first positions in the export without the adapter, where what quantization costs is measured.
    """

    pytorch: np.ndarray
    exported: np.ndarray
    limits: Tolerances
    is_logits: bool
    precise: np.ndarray | None = None
    n_precise: int = 0
    without: np.ndarray | None = None
    targets: np.ndarray | None = None
    found_without: np.ndarray | None = None

    @cached_property
    def error(self) -> float:
        """Largest absolute difference."""
        return largest_difference(self.pytorch, self.exported)

    @cached_property
    def effect(self) -> float | None:
        """Largest absolute difference that the adapter makes in PyTorch."""
        if self.without is None:
            return None
        return largest_difference(self.pytorch[: len(self.without)], self.without)

    @cached_property
    def rounding(self) -> Rounding | None:
        """How far both sides are from PyTorch at the wider dtype."""
        if self.precise is None:
            return None
        n, precise = len(self.precise), self.precise
        pytorch, exported = self.pytorch[:n], self.exported[:n]
        return Rounding(
            rms_reference=rms_difference(pytorch, precise),
            rms_exported=rms_difference(exported, precise),
            error_reference=largest_difference(pytorch, precise),
            error_exported=largest_difference(exported, precise),
            kl_reference=mean_kl(precise, pytorch) if self.is_logits else None,
            kl_exported=mean_kl(precise, exported) if self.is_logits else None,
            top1_reference=top1_agreement(precise, pytorch, margin=0) if self.is_logits else None,
            top1_exported=top1_agreement(precise, exported, margin=0) if self.is_logits else None,
            perplexity=self._perplexity(precise),
        )

    @cached_property
    def perplexities(self) -> BothSides | None:
        """Of a language model, on the targets."""
        reference = self._perplexity(self.pytorch) if self.is_logits else None
        return None if reference is None else BothSides(reference, self._perplexity(self.exported))

    def _perplexity(self, logits: np.ndarray) -> float | None:
        targets = None if self.targets is None else self.targets[: len(logits)]
        is_known = targets is not None and (targets >= 0).any()
        return measures.perplexity(logits, targets) if is_known else None

    @cached_property
    def effect_share(self) -> EffectShare | None:
        """How much of the adapter's effect arrived, and how far that may be from 1."""
        if self.without is None:
            return None
        noise = _largest_rounding(self.rounding, self.pytorch, self.limits)
        return effect_share(
            self.pytorch, self.exported, self.without, rounding=self.limits.effect_share or 0, noise=noise
        )


def noise_of(rounding: Rounding | None, expected: np.ndarray, limits: Tolerances) -> float | None:
    """How far a logit may be off by rounding alone; None where nothing tells.

    It is how far PyTorch's own logits are off, times the multiple that is allowed; where that is not known, it is the
    tolerance of float32. It is never the error that was seen: with that, no best class could be wrong.
    """
    if rounding is not None:
        return limits.noise * max(rounding.error_reference, limits.epsilon * scale_of(expected))
    return None if limits.error is None else limits.error * output_scale(expected)


def _largest_rounding(rounding: Rounding | None, expected: np.ndarray, limits: Tolerances) -> float | None:
    """Root mean square of the export less PyTorch at the same dtype that rounding explains, both sides' together; None
    if unknown."""
    if rounding is None:
        return None
    own = max(rounding.rms_reference, limits.epsilon / 4 * measures.typical_size(expected))
    return math.hypot(1.0, _OF_THE_LIMIT * limits.noise) * own


# A measure's value and its limit, None where nothing limits it; None in place of both where it has no meaning.
Figure = tuple[float, float | None] | None


def _error(sides: Sides) -> Figure:
    return (sides.error / output_scale(sides.pytorch), sides.limits.error) if sides.is_logits else None


def _features(sides: Sides) -> Figure:
    return None if sides.is_logits else (sides.error / output_scale(sides.pytorch), sides.limits.features)


def _rounding(sides: Sides) -> Figure:
    """More than the table's limit where few positions leave more to chance."""
    if sides.rounding is None:
        return None
    # Rounding the output alone, to the dtype, gives a quarter of a unit; PyTorch may have had more luck than that.
    least = sides.limits.epsilon / 4 * measures.typical_size(sides.precise)
    ratio = sides.rounding.rms_exported / max(sides.rounding.rms_reference, least, _TINY)
    luck = max(1.0, _OF_THE_LIMIT * scatter_of_ratio(sides.n_precise or len(sides.precise)))
    return ratio, None if sides.limits.rounding is None else sides.limits.rounding * luck


def _kl(sides: Sides) -> Figure:
    return (mean_kl(sides.pytorch, sides.exported), sides.limits.kl) if sides.is_logits else None


def _top1(sides: Sides) -> Figure:
    noise = noise_of(sides.rounding, sides.pytorch, sides.limits) if sides.is_logits else None
    if noise is None:
        return None
    return top1_agreement(sides.pytorch, sides.exported, margin=2 * noise), sides.limits.top1


def _perplexity(sides: Sides) -> Figure:
    both = sides.perplexities
    return None if both is None else (abs(both.exported / both.reference - 1), sides.limits.perplexity)


def _effect(sides: Sides) -> Figure:
    return None if sides.effect is None else (sides.effect / max(sides.error, _TINY), sides.limits.effect)


def _effect_share(sides: Sides) -> Figure:
    share = sides.effect_share
    if share is None:
        return None
    return share.value, None if sides.limits.effect_share is None else share.tolerance


# By the names of `tolerances.MEASURES`, in their order.
FORMULAS: dict[str, Callable[[Sides], Figure]] = {
    "error": _error,
    "features": _features,
    "rounding": _rounding,
    "kl": _kl,
    "top1": _top1,
    "perplexity": _perplexity,
    "effect": _effect,
    "effect_share": _effect_share,
}


def _cost_kl(sides: Sides) -> Figure:
    return (mean_kl(sides.pytorch, sides.exported), sides.limits.cost_kl) if sides.is_logits else None


def _cost_top1(sides: Sides) -> Figure:
    if not sides.is_logits:
        return None
    return top1_agreement(sides.pytorch, sides.exported, margin=0), sides.limits.cost_top1


def _cost_perplexity(sides: Sides) -> Figure:
    both = sides.perplexities
    return None if both is None else (both.exported / both.reference - 1, sides.limits.cost_perplexity)


def _cost_effect(sides: Sides) -> Figure:
    """Of an export without the adapter, its own effect; else what it differs by from the floats without."""
    if sides.without is None:
        return None
    found_without = sides.without if sides.found_without is None else sides.found_without
    square = product = 0.0
    n = len(sides.without)
    four = (sides.pytorch, sides.without, sides.exported, found_without)
    for with_it, without, found, base in blocks(*(side[:n] for side in four)):
        square += float(np.square(with_it - without).sum())
        product += float(((found - base) * (with_it - without)).sum())
    return (product / square if square else 0.0), sides.limits.cost_effect


# What quantization costs: the same on the base's floats against the export as it runs.
COST_FORMULAS: dict[str, Callable[[Sides], Figure]] = {
    "cost_kl": _cost_kl,
    "cost_top1": _cost_top1,
    "cost_perplexity": _cost_perplexity,
    "cost_effect": _cost_effect,
}
