"""How the next token is chosen from a decoder's scores: greedily, or drawn at a temperature. NumPy only.

In the order of Transformers' logits processors: the repetition penalty (Keskar et al., arXiv 1909.05858), the
temperature, the `top_k` likeliest, and the fewest of these whose probabilities reach `top_p` (Holtzman et al., arXiv
1904.09751).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from lora_export.errors import UsageProblem

# Beyond these, nothing changes any more but rounding errors. Published configurations have temperatures from 1e-6 on.
LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-6, 100.0
LEAST_PENALTY, MOST_PENALTY = 1e-3, 1e3


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the likeliest token; else scores are divided by it and a token is drawn.
        top_k: Draw from this many of the likeliest tokens; 0 from all.
        top_p: Draw from the fewest likeliest tokens whose probabilities add up to this; 1 from all.
        repetition_penalty: Positive scores of tokens that the text has are divided by it, negative ones multiplied.
        seed: The same seed draws the same tokens from the same scores; None draws others each time.

    Raises:
        UsageProblem: A value is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        ranges = {
            "temperature": (
                f"0, or a number from {LEAST_TEMPERATURE:g} to {MOST_TEMPERATURE:g}",
                self.temperature == 0 or LEAST_TEMPERATURE <= self.temperature <= MOST_TEMPERATURE,
            ),
            "top_k": ("a whole number from 0 on", self.top_k >= 0 and int(self.top_k) == self.top_k),
            "top_p": ("a number over 0, at most 1", 0 < self.top_p <= 1),
            "repetition_penalty": (
                f"a number from {LEAST_PENALTY:g} to {MOST_PENALTY:g}",
                LEAST_PENALTY <= self.repetition_penalty <= MOST_PENALTY,
            ),
            "seed": ("a whole number from 0 on, or none", self.seed is None or self.seed >= 0),
        }
        for name, (expected, holds) in ranges.items():
            if not holds:
                raise UsageProblem(
                    "A sampling option is out of its range",
                    where=name,
                    expected=expected,
                    found=str(getattr(self, name)),
                )


class Sampler:
    """Chooses the tokens of one text, with random numbers of its own: other texts of a batch do not matter."""

    def __init__(self, sampling: Sampling, prompt_ids: Iterable[int]) -> None:
        self._sampling = sampling
        self._rng = np.random.default_rng(sampling.seed)
        self._seen = set(prompt_ids) if sampling.repetition_penalty != 1 else set()

    def choose(self, scores: np.ndarray) -> int:
        """The next token's id for `scores` `[vocabulary]`, which are not changed.

        Raises:
            FloatingPointError: The scores are not finite, so that no token is the likeliest.
        """
        require_finite(scores)
        sampling = self._sampling
        if sampling.repetition_penalty != 1:
            scores = penalized(scores, self._seen, sampling.repetition_penalty)
            require_finite(scores)
        token = int(scores.argmax()) if sampling.temperature == 0 else self._drawn(scores)
        if sampling.repetition_penalty != 1:
            self._seen.add(token)
        return token

    def _drawn(self, scores: np.ndarray) -> int:
        shares = probabilities(scores, self._sampling)
        return int(self._rng.choice(len(shares), p=shares))


def require_finite(scores: np.ndarray) -> None:
    """Raise FloatingPointError where no score is the largest."""
    if not np.isfinite(scores.max()):
        raise FloatingPointError("the scores of the next token are not finite")


def penalized(scores: np.ndarray, seen: Iterable[int], penalty: float) -> np.ndarray:
    """A copy of `scores` in which tokens that were `seen` are less likely."""
    changed = scores.astype(np.float32)
    tokens = np.fromiter(seen, np.int64)
    of_seen = changed[tokens]
    changed[tokens] = np.where(of_seen > 0, of_seen / penalty, of_seen * penalty)
    return changed


def probabilities(scores: np.ndarray, sampling: Sampling) -> np.ndarray:
    """What tokens are drawn with, `[vocabulary]` in float64; 0 for those that are left out."""
    scores = scores.astype(np.float64)
    scaled = (scores - scores.max()) / sampling.temperature  # the likeliest is 0 at any temperature
    if 0 < sampling.top_k < len(scaled):
        scaled[scaled < np.partition(scaled, -sampling.top_k)[-sampling.top_k]] = -np.inf
    shares = np.exp(scaled)
    shares /= shares.sum()
    if sampling.top_p < 1:
        order = np.argsort(-shares, kind="stable")
        # A token is kept if those before it do not reach `top_p`; the likeliest always is.
        before = np.cumsum(shares[order]) - shares[order]
        shares[order[before >= sampling.top_p]] = 0
        shares /= shares.sum()
    return shares
