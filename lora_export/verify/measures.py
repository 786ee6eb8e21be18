"""Measures of how two sets of outputs differ, in float64. NumPy only."""

from __future__ import annotations

import numpy as np


def rms(differences: np.ndarray) -> float:
    """Root mean square; 0 of nothing."""
    return float(np.sqrt(np.mean(np.square(differences)))) if differences.size else 0.0


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
    is_known = targets >= 0
    chosen = _log_softmax(logits[is_known])[np.arange(int(is_known.sum())), targets[is_known]]
    return float(np.exp(-chosen.mean()))


def mean_kl(expected: np.ndarray, actual: np.ndarray) -> float:
    """Mean over positions of KL(softmax(expected) ‖ softmax(actual)), nats."""
    log_p, log_q = _log_softmax(expected), _log_softmax(actual)
    return max(0.0, float((np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean()))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def top1_agreement(expected: np.ndarray, actual: np.ndarray, margin: float) -> float:
    """Share of positions with the same largest logit; a flip within `margin` of a tie in the reference agrees."""
    best = expected.argmax(axis=-1)
    chosen = np.take_along_axis(expected, actual.argmax(axis=-1)[:, None], axis=-1)[:, 0]
    return float((expected[np.arange(len(best)), best] - chosen <= margin).mean())
