"""How much of an adapter's effect arrived in an export. NumPy only.

`e` is the effect in the reference: its output with the adapter, less that without. `f` is the output of the export,
less that of the reference without the adapter. The share is the slope of `f` on `e`, `⟨f, e⟩ / ⟨e, e⟩`: 1 where the
export is right, 0 where the adapter was dropped, 1.01 where its scale is 1 % too large.

What is left, `r = f − share · e`, is rounding. Its size relative to the effect, `ρ = ‖r‖ / ‖e‖`, says how well the
slope is known. The errors of many values cancel in a slope. So the slope shows a scale that is 1 % off even where
single values have errors as large as that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lora_export.check.judge.measures import ENOUGH, blocks

# Standard errors: of 200 sound exports the one that came nearest used 0.84 of the tolerance.
_STANDARD_ERRORS = 4
# A share that is not even known to be nearer to 1 than to 0 shows no adapter.
_LARGEST = 0.5


@dataclass(frozen=True)
class EffectShare:
    """The share, and how far it may be from 1 by rounding."""

    value: float
    tolerance: float


def effect_share(
    expected: np.ndarray, found: np.ndarray, without: np.ndarray, *, rounding: float, noise: float | None = None
) -> EffectShare:
    """The share of the effect that `found` has, over the first positions, which `without` holds.

    For `n` positions the tolerance is `rounding + 4 ρ/√n + ρ²`, the last two together at most 0.5. `4 ρ/√n` is four
    standard errors of a slope with `n` independent errors; values at one position are not independent, so a position
    counts once. `ρ²` is there because `e` and `f` both hold the reference's own rounding without the adapter, which
    moves a slope by the square of its size. With ρ = 0.01 and 400 positions: 0.002 + 0.0001.

    Args:
        expected, found, without: `[positions, values]`.
        rounding: What the rounding of the stored factors alone may change a scale by.
        noise: The most that rounding of the outputs can be, root mean square, where that is known. It bounds `ρ`: an
            error beyond it comes from damage, and must not widen the tolerance.
    """
    square = product = 0.0
    for effect, arrived in _effects(expected, found, without):
        square += float(np.square(effect).sum())
        product += float((arrived * effect).sum())
    if square == 0:
        return EffectShare(0.0, _LARGEST)
    share = product / square
    # A slope goes through one value, and nearly through a few: what is left of them says nothing of their rounding.
    rest = math.inf
    if without.size >= ENOUGH:
        left = sum(float(np.square(a - share * e).sum()) for e, a in _effects(expected, found, without))
        rest = math.sqrt(left / square)
    if noise is not None:
        rest = min(rest, noise / math.sqrt(square / without.size))
    noise_of_slope = _STANDARD_ERRORS * rest / math.sqrt(len(without)) + rest**2
    return EffectShare(share, rounding + min(_LARGEST, noise_of_slope))


def _effects(*sides: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The effect in the reference and in the export, a block of positions at a time."""
    n = len(sides[-1])
    for expected, found, without in blocks(*(side[:n] for side in sides)):
        yield expected - without, found - without
