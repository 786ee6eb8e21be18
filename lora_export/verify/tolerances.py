"""What a parity error may be, by dtype and provider: one table, a reason for each number.

float32 is judged by the largest error relative to the largest reference magnitude (at least 1). In half precision the
largest of many roundings says little, so distributions are compared instead; where there are no logits, the relative
error is, at what a dozen layers of roundings amount to.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerances:
    """Gates of one dtype on one provider; None where a measure does not gate.

    Attributes:
        relative: Of the error over max(1, largest absolute reference value).
        features: The same for outputs without logits (hidden states).
        kl: Of the mean Kullback-Leibler divergence, nats.
        top1: Lower bound of the agreement of the largest logit, 0 to 1.
        effect_ratio: Lower bound of (effect of the adapter) / error, else the adapter is taken for dropped. Not in half
            precision, where a weak adapter's effect is a few roundings at one place and clear over all of them.
        effect_share: How far the share of the effect that arrives may be from 1, beside what rounding of the outputs
            does (see `effect.py`): two units of the dtype for factors that were scaled, multiplied and rounded; in
            float32 what `relative` allows.
        reason: Why these numbers.
    """

    relative: float | None
    features: float
    kl: float | None
    top1: float
    effect_ratio: float | None
    effect_share: float
    reason: str


_FLOAT32_CPU = Tolerances(1e-4, 1e-4, None, 0.999, 10, 1e-4, "float32 rounding through a deep network stays near 1e-6")
_FLOAT32_CUDA = Tolerances(1e-3, 1e-3, None, 0.999, 10, 1e-3, "other summation orders on a GPU; TF32 is off")
_FLOAT16 = Tolerances(
    None, 2e-2, 1e-3, 0.99, None, 2**-10, "11-bit significands: errors of 1e-3 a layer, top-1 may flip at ties"
)
_BFLOAT16 = Tolerances(None, 1e-1, 1e-2, 0.98, None, 2**-7, "8-bit significands: eight times float16's rounding")


def tolerances(dtype: str, provider: str) -> Tolerances:
    """The gates for an export of `dtype` run on `provider` ("cpu" or "cuda")."""
    if dtype == "float32":
        return _FLOAT32_CUDA if provider == "cuda" else _FLOAT32_CPU
    return _FLOAT16 if dtype == "float16" else _BFLOAT16
