"""Measures of how two sets of outputs differ, in float64, a block of positions at a time. NumPy only.

A language model's scores are many: 150 positions of 49,152 are 59 MB in float64, and a divergence takes five arrays of
that size. In blocks of a million numbers they are 8 MB each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

_BLOCK = 1 << 20

# Of so many numbers around zero the largest is not near zero by chance: all of them lie within a hundredth of their
# usual size with a probability of 0.008 ** 8, 2e-17.
ENOUGH = 8


# An array that large has many numbers, if not all are one.
_SURELY_MANY = 64 * ENOUGH


def blocks(*arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """The positions of `arrays`, each `[positions, …]`, in float64, a million numbers at a time.

    Raises:
        ValueError: They have different numbers of positions.
    """
    n_positions, *others = map(len, arrays)
    if any(n != n_positions for n in others):
        raise ValueError(f"arrays of {n_positions} and {others} positions")
    step = max(1, _BLOCK // max(1, math.prod(arrays[0].shape[1:])))
    for start in range(0, n_positions, step):
        yield tuple(array[start : start + step].astype(np.float64) for array in arrays)


def numbers(*arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """As `blocks`, for what is of each number by itself: also within a position that has more than a million."""
    is_long = math.prod(arrays[0].shape[1:]) > _BLOCK
    return blocks(*(array.reshape(-1) for array in arrays) if is_long else arrays)


def largest(values: np.ndarray) -> float:
    """Largest absolute value; 0 of nothing."""
    return float(np.maximum(values.max(initial=0), -values.min(initial=0)))


def largest_difference(one: np.ndarray, other: np.ndarray) -> float:
    """Largest absolute difference of two arrays of the same shape; 0 of nothing."""
    return largest(np.array([largest(a - b) for a, b in numbers(one, other)]))


def is_few(values: np.ndarray) -> bool:
    """Whether there are fewer than `ENOUGH` numbers in `values`; those that are equal up to rounding are one.

    The texts that a model does not tell apart have one score, and one rounding, however many they are.
    """
    if not ENOUGH <= values.size < _SURELY_MANY or not np.isfinite(values).all():
        return values.size < ENOUGH
    size = largest(values)
    return size > 0 and len(np.unique(np.round(values / (1e-5 * size)))) < ENOUGH


def scale_of(expected: np.ndarray, terms: float | None = None) -> float:
    """The size that an error of `expected` is measured against: the largest absolute value, 0 of nothing.

    One logit or one cosine may be near zero by chance, while its error is that of the terms that it is the sum of. So
    fewer than `ENOUGH` values count as no smaller than the size of those terms.

    Args:
        terms: The root of the sum of squares of the terms of one value; None where that is unknown: 1, which is the
            size of what a normalized state, a cosine or a logit is made of.
    """
    size = largest(expected)
    return max(size, 1.0 if terms is None else terms) if is_few(expected) else size


def output_scale(expected: np.ndarray) -> float:
    """As `scale_of`, of a model's output, whose errors count absolutely where it is small: at least 1."""
    return max(1.0, scale_of(expected))


def typical_size(expected: np.ndarray) -> float:
    """Root mean square of `expected`; of fewer than `ENOUGH` values at least 1, as in `scale_of`."""
    return max(1.0, rms(expected)) if is_few(expected) else rms(expected)


def rms(values: np.ndarray) -> float:
    """Root mean square; 0 of nothing."""
    return math.sqrt(sum(float(np.square(part).sum()) for (part,) in numbers(values)) / max(1, values.size))


def rms_difference(one: np.ndarray, other: np.ndarray) -> float:
    """Root mean square of the differences of two arrays of the same shape; 0 of nothing."""
    return math.sqrt(sum(float(np.square(a - b).sum()) for a, b in numbers(one, other)) / max(1, one.size))


def scatter_of_ratio(n: int) -> float:
    """The factor by which the ratio of two equal root mean squares, each over `n` positions, is off by chance once in
    ten thousand.

    The logarithm of such a ratio has a standard deviation of about `1/√n`: the relative variance of a mean of `n`
    squares of normal numbers is `2/n`, a root halves it, and there are two; `n − 2` makes up for long tails at small
    `n`. A position counts once, however many numbers it has, as their errors come from the same hidden state.
    """
    return float(np.exp(3.72 / np.sqrt(max(n - 2, 0.5))))


def perplexity(logits: np.ndarray, targets: np.ndarray) -> float:
    """`exp` of the mean negative log-likelihood of `targets` `[positions]` under `logits` `[positions, vocabulary]`.

    Positions with a negative target have none; at least one must have one.
    """
    found = []
    for part, chosen in blocks(logits, targets):
        is_known = chosen >= 0
        at = chosen[is_known].astype(np.int64)
        found.append(_log_softmax(part[is_known])[np.arange(len(at)), at])
    return float(np.exp(-np.concatenate(found).mean()))


def mean_kl(expected: np.ndarray, actual: np.ndarray) -> float:
    """Mean over positions of KL(softmax(expected) ‖ softmax(actual)), nats."""
    total = 0.0
    for expected_part, actual_part in blocks(expected, actual):
        log_p, log_q = _log_softmax(expected_part), _log_softmax(actual_part)
        total += float((np.exp(log_p) * (log_p - log_q)).sum())
    return max(0.0, total / len(expected))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def top1_agreement(expected: np.ndarray, actual: np.ndarray, margin: float) -> float:
    """Share of positions with the same largest logit; a flip within `margin` of a tie in the reference agrees."""
    best = expected.argmax(axis=-1)
    rows = np.arange(len(best))
    ahead = expected[rows, best].astype(np.float64) - expected[rows, actual.argmax(axis=-1)]
    return float((ahead <= margin).mean())
