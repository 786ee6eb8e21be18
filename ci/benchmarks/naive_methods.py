"""What simpler latency gates would say of the same samples, for comparison with the paired blocks.

Each takes milliseconds a run of a reference and of what is compared with it, and says whether it would fail the job.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

_LEVEL, _SHARE = 0.05, 1.05


def mann_whitney_p(reference: Sequence[float], other: Sequence[float]) -> float:
    """One-sided p of "`other` is slower" by the Mann-Whitney U test: normal approximation, corrected for ties.

    `U = Σ_ij [other_j > reference_i] + ½ [other_j = reference_i]`; good from about 20 samples a side.
    """
    n, m = len(reference), len(other)
    ordered = sorted([*reference, *other])
    ranks, ties, at = {}, 0, 0
    while at < n + m:
        end = at
        while end < n + m and ordered[end] == ordered[at]:
            end += 1
        ranks[ordered[at]] = (at + 1 + end) / 2
        ties += (end - at) ** 3 - (end - at)
        at = end
    u = sum(ranks[value] for value in other) - m * (m + 1) / 2
    variance = n * m / 12 * ((n + m + 1) - ties / ((n + m) * (n + m - 1)))
    if variance == 0:
        return 1.0
    z = (u - n * m / 2 - 0.5) / math.sqrt(variance)
    return 1 - statistics.NormalDist().cdf(z)


def mann_whitney(reference: Sequence[float], other: Sequence[float]) -> bool:
    return mann_whitney_p(reference, other) < _LEVEL


def medians(reference: Sequence[float], other: Sequence[float]) -> bool:
    return statistics.median(other) > _SHARE * statistics.median(reference)


_METHODS: dict[str, Callable[[Sequence[float], Sequence[float]], bool]] = {
    "Mann-Whitney p < .05": mann_whitney,
    "medians differ by 5 %": medians,
}


def verdicts(reference: Sequence[float], other: Sequence[float], what: str) -> dict[str, bool]:
    """Whether each method fails the job, by name, on samples taken in turn and on samples taken one after the other.

    `what` names the samples. The two have as many of them.

    "In turn" has every sample of both. "One after the other" has the reference's first half and the other's second
    half: what two jobs would have had that ran one behind the other, each with sessions of its own.
    """
    half = len(reference) // 2
    pairs = {"in turn": (reference, other), "one after the other": (reference[:half], other[half:])}
    return {
        f"{method}, {what} {taken}": fails(*samples)
        for taken, samples in pairs.items()
        for method, fails in _METHODS.items()
    }
