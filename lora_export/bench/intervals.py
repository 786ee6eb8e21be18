"""Median ratios of paired blocks, their exact confidence interval, and the verdict on them.

The interval for the median comes from order statistics: of n blocks, the k-th smallest and k-th largest cover the
median with probability 1 − 2·P(Binomial(n, ½) < k), whatever the distribution.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from lora_export.bench.results import Ratio, Variant
from lora_export.verdict import Verdict

CONFIDENCE = 0.95


def paired_ratio(variant: Variant, base: Variant, allowance: float | None) -> Ratio:
    """The median over blocks of `variant / base`, of the samples' fastest runs, with its interval and verdict."""

    def block_sums(samples: tuple[float, ...]) -> list[float]:
        return [first + second for first, second in zip(samples[::2], samples[1::2], strict=True)]

    pairs = zip(block_sums(variant.fastest_ms), block_sums(base.fastest_ms), strict=True)
    ratios = [one / other for one, other in pairs]
    low, high, confidence = median_interval(ratios)
    return Ratio(
        variant.name,
        base.name,
        statistics.median(ratios),
        low,
        high,
        confidence,
        tuple(ratios),
        allowance,
        _judged(low, high, confidence, allowance=allowance),
    )


def _judged(low: float, high: float, confidence: float, *, allowance: float | None) -> Verdict:
    """As `verdict`; undecided where there are too few blocks for an interval of 95 %, in a bench that was stopped."""
    found = verdict(low, high, allowance)
    return Verdict.AMBIGUOUS if allowance is not None and confidence < CONFIDENCE else found


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float, float]:
    """`(low, high, coverage)`: the narrowest order-statistics interval for the median that covers `confidence`.

    For 30 values: the 10th and 21st, 95.7 %. With fewer than 6 values no such interval exists: the extremes, with
    what they cover.
    """
    ordered, n = sorted(values), len(values)
    tail, k = 0.0, 0
    while k < n // 2:
        below = tail + math.comb(n, k) / 2**n
        if 1 - 2 * below < confidence:
            break
        tail, k = below, k + 1
    k = max(k, 1)
    coverage = 1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n
    return ordered[k - 1], ordered[n - k], coverage


def verdict(low: float, high: float, allowance: float | None) -> Verdict:
    """Fail only if the whole interval exceeds the allowance, pass only if none of it does."""
    if allowance is None:
        return Verdict.NOT_GATED
    if low > allowance:
        return Verdict.FAIL
    return Verdict.PASS if high <= allowance else Verdict.AMBIGUOUS
