"""Quantized weights against the floats that they stand for. NumPy only.

Of a block with scale `s` and zero `z`, the stored number `q` stands for `s (q − z)`, one of a grid of `2**bits`. Three
measures over all blocks of all weights:

- *weights*: how much farther `s (q − z)` is from the float `w` than the nearest of the grid, over the grid's range
  `2**bits |s|`, or over `|z s|` where that is more. It is 0 where every `q` is the best there is. Rounding of `w`
  changes the measure by as much as it changes `w`.
- *scales*: how far the grid's range is from the block's own, relative to the block's. Without zeros, the grid's farther
  end `−s 2**(bits − 1)` is compared with the `w` of the largest `|w|`. Where blocks have zeros, `s (2**bits − 1)` is
  compared with the largest `w` less the smallest, of the block's numbers and 0.
- *clipping*: how much farther `s (q − z)` is from `w` than a sound grid can be, over the grid's range. The nearest of a
  grid that lies elsewhere is far away. A sound one reaches every `w` to half a step, but its shorter end may be a step
  short: without zeros it has one number less there.

A method that chooses grids near the block's own range may leave a number out. Then *scales* counts only what is beyond
the method's choice, and the block's range is that of its numbers alone. *clipping* counts only what is beyond two steps
of the plain grid, whose range is the block's with zero in it. HQQ's steps are no finer than 1/20000.

For a checkpoint's own integers the export chose nothing. *weights* is then how far `s (q − z)`, rounded to the dtype
that the checkpoint gives, is from `w`, over the grid's range. It is 0 where integers, scales and zeros are the
checkpoint's. Nothing else is measured.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Protocol

import ml_dtypes
import numpy as np

from lora_export.check.judge.tolerances import Limit, Tolerances, tolerances
from lora_export.check.results import Measured, ParityCase
from lora_export.quantization import Method

_TINY = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True)
class _Choice:
    """How a method may choose a block's grid.

    Attributes:
        range_slack: By how much of the block's range that of the grid may differ.
        finest: The smallest step.
    """

    range_slack: float
    finest: float = 0.0


# K-quant tries 14/15 to 16/15 of the range, and least squares move it: by up to 0.13 as seen on drawn weights.
_CHOICES = {Method.K_QUANT: _Choice(0.25), Method.HQQ: _Choice(0.0, finest=1 / 2e4)}
_CHOSEN_STEPS = 2.0
# In which a checkpoint's method may give a weight.
_GIVEN_DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)


class Stored(Protocol):
    """See `graph.stored_integers.StoredInteger`."""

    bits: int
    block_size: int
    integers: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    has_zeros: bool

    def by_element(self, of_blocks: np.ndarray) -> np.ndarray: ...


@dataclass
class WeightErrors:
    """The worst of the weights seen.

    Attributes:
        method: How the grids were chosen.
        off: The measure *weights*.
        range_error: The measure *scales*.
        clipped: The measure *clipping*.
        worst: The weight that the last of them to grow is of.
    """

    method: Method = Method.RTN
    n_weights: int = 0
    off: float = 0.0
    range_error: float = 0.0
    clipped: float = 0.0
    worst: str = ""

    def take(self, name: str, stored: Stored, expected: np.ndarray) -> None:
        """Compare `stored` with the floats `expected` `[out, in]`."""
        if self.method is Method.AS_STORED:
            found = (_unlike(stored, expected), 0.0, 0.0)
        else:
            found = self._of_rounding(stored, expected.astype(np.float64))
        before = (self.off, self.range_error, self.clipped)
        if not all(new <= old for new, old in zip(found, before, strict=True)):
            self.worst = name
        self.off, self.range_error, self.clipped = map(_worse, before, found)
        self.n_weights += 1

    def _of_rounding(self, stored: Stored, expected: np.ndarray) -> tuple[float, float, float]:
        choice = _CHOICES.get(self.method)
        return _off(stored, expected), _range_error(stored, expected, choice), _clipped(stored, expected, choice)


def _worse(one: float, other: float) -> float:
    return math.inf if math.isnan(other) else max(one, other)


def _unlike(stored: Stored, expected: np.ndarray) -> float:
    """The measure *weights* of integers that nobody rounded, in the dtype in which it is the least."""
    scales = stored.by_element(stored.scales)
    values = scales * (stored.integers - stored.by_element(stored.zeros))
    reach = np.maximum(np.abs(scales) * (1 << stored.bits), _TINY)
    with np.errstate(over="ignore", invalid="ignore"):
        given = [values.astype(dtype).astype(np.float64) for dtype in _GIVEN_DTYPES]
        errors = [float((np.abs(each - expected) / reach).max(initial=0)) for each in given]
    return min(_worse(0.0, error) for error in errors)


def _off(stored: Stored, expected: np.ndarray) -> float:
    scales, zeros = stored.by_element(stored.scales), stored.by_element(stored.zeros)
    levels = 1 << stored.bits
    with np.errstate(divide="ignore", invalid="ignore"):
        place = np.where(scales == 0, 0.0, expected / scales) + zeros
    nearest = np.clip(np.round(place), 0, levels - 1)
    best = np.abs(scales * (nearest - zeros) - expected)
    farther = np.abs(scales * (stored.integers - zeros) - expected) - best
    reach = np.abs(scales) * np.maximum(levels, np.abs(zeros))
    return float((farther / np.maximum(reach, _TINY)).max(initial=0))


def _ends(stored: Stored, expected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest and the smallest number of each block, `[out, blocks]`; what fills the last block is zero."""
    padding = -expected.shape[1] % stored.block_size
    blocks = np.pad(expected, ((0, 0), (0, padding))).reshape(len(expected), -1, stored.block_size)
    return blocks.max(axis=2), blocks.min(axis=2)


def _range_error(stored: Stored, expected: np.ndarray, choice: _Choice | None) -> float:
    largest, smallest = _ends(stored, expected)
    n_steps, slack = (1 << stored.bits) - 1, 0.0
    if choice is not None:
        own, slack = largest - smallest, choice.range_slack
        error = np.abs(stored.scales * n_steps - np.maximum(own, choice.finest * n_steps))
    elif stored.has_zeros:
        own = np.maximum(largest, 0) - np.minimum(smallest, 0)
        error = np.abs(stored.scales * n_steps - own)
    else:
        largest, smallest = np.maximum(largest, 0), np.minimum(smallest, 0)
        own, end = np.maximum(largest, -smallest), -stored.scales * (1 << (stored.bits - 1))
        error = np.minimum(np.abs(end - largest), np.abs(end - smallest))  # either, where both are as large
    is_there = own > 0
    return max(float((error[is_there] / own[is_there]).max(initial=0)) - slack, 0.0)  # NaN stays NaN


def _clipped(stored: Stored, expected: np.ndarray, choice: _Choice | None) -> float:
    scales, zeros = stored.by_element(stored.scales), stored.by_element(stored.zeros)
    error = np.abs(scales * (stored.integers - zeros) - expected)
    if choice is None:
        step, steps = np.abs(scales), 0.5 if stored.has_zeros else 1.0
    else:
        largest, smallest = _ends(stored, expected)
        plain = (np.maximum(largest, 0) - np.minimum(smallest, 0)) / ((1 << stored.bits) - 1)
        step, steps = stored.by_element(np.maximum(plain, choice.finest)), _CHOSEN_STEPS
    return float(((error - steps * step) / np.maximum((1 << stored.bits) * step, _TINY)).max(initial=0))


def limits_of_integers(limits: Tolerances, method: Method, asked: Collection[str]) -> Tolerances:
    """`limits` for integers that ONNX Runtime's quantizers did not choose.

    Those of another tool, chosen in whatever way, are limited only by what was `asked` for. A quantized base's own were
    rounded by nobody, so the limit of float32 is that of every dtype.
    """
    if method is Method.GIVEN:
        changed: dict[str, float | None] = dict.fromkeys(("weights", "scales", "clipping"))
        reason = "none: another tool chose the integers"
    elif method is Method.AS_STORED:
        changed = {"weights": tolerances("float32", "cpu", quantized=True).weights}
        reason = "nothing was rounded: integers, scales and zeros are the base's"
    else:
        return limits
    changed = {measure: limit for measure, limit in changed.items() if measure not in asked}
    recorded = (Limit(e.measure, changed[e.measure], reason) if e.measure in changed else e for e in limits.recorded)
    return replace(limits, **changed, recorded=tuple(recorded))


def weights_case(errors: WeightErrors, limits: Tolerances, against: str) -> ParityCase:
    """What was seen, as a case."""
    measured = (Measured.of("weights", errors.off, limits.weights),)
    if errors.method is not Method.AS_STORED:
        measured += (
            Measured.of("scales", errors.range_error, limits.scales),
            Measured.of("clipping", errors.clipped, limits.clipping),
        )
    failures = tuple(f"{each.failure} ({errors.worst})" for each in measured if each.failed)
    return ParityCase("quantized weights", "weights", against, errors.n_weights, measured, failures)
