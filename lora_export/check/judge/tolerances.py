"""What a parity measure may be, by dtype and provider: one table, a reason for each number.

float32 is judged by the largest error relative to the largest reference magnitude (at least 1). In half precision the
largest of many roundings says little, so distributions are compared instead. Where there are no logits, the relative
error is limited by what the roundings of a dozen layers amount to.

At every dtype the export's distance from PyTorch at a wider dtype is limited, too: to a multiple of PyTorch's own
distance. This is the sharpest of the limits, as it takes into account how well the model can be computed at this dtype.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import assert_never

from lora_export.errors import UsageProblem


@dataclass(frozen=True)
class Limit:
    """One limit.

    Attributes:
        measure: What is limited, a name in `MEASURES`.
        limit: None where nothing limits the measure at this dtype.
        reason: Why this number.
        overridden: Whether the limit was given by the user.
    """

    measure: str
    limit: float | None
    reason: str
    overridden: bool = False


class Bound(StrEnum):
    """On which side of its limit a measure must be."""

    AT_MOST = "at most"
    AT_LEAST = "at least"
    SHARE_AT_LEAST = "a share, at least"
    AROUND_ONE = "from 1, at most"


@dataclass(frozen=True)
class Measure:
    """What is measured, in words; `failure` says in a sentence that `value` is beyond `limit`."""

    meaning: str
    failure: str
    bound: Bound = Bound.AT_MOST


_ERROR = "the error is {value:.2e} of the output's size; at most {limit:.0e} is rounding"
MEASURES = {
    "error": Measure(
        "largest absolute difference of the logits over max(1, largest absolute reference value); at most", _ERROR
    ),
    "features": Measure("the same for outputs without logits (hidden states, embeddings); at most", _ERROR),
    "rounding": Measure(
        "root mean square of (export − PyTorch at a wider dtype) over that of PyTorch at this dtype; at most",
        "the error is {value:.3g} × what PyTorch itself loses by rounding at this dtype; at most {limit:.3g} × is "
        "rounding",
    ),
    "kl": Measure(
        "mean Kullback-Leibler divergence of the distributions, nats; at most",
        "the distributions differ by {value:.2e} nats; at most {limit:.0e} is rounding",
    ),
    "top1": Measure(
        "share of positions with the same best class, flips within the noise aside; at least",
        "the best class agrees in {value:.2%} of positions; {limit:.1%} is expected",
        Bound.SHARE_AT_LEAST,
    ),
    "perplexity": Measure(
        "relative difference of the perplexities on the data; at most",
        "the perplexity is off by {value:.2e} of it; at most {limit:.0e} is rounding",
    ),
    "effect": Measure(
        "what the adapter changes in the reference over the error, else it counts as dropped; at least",
        "the adapter has no effect here: it changes the reference by {value:.3g} × the error; at least {limit:g} × is "
        "expected",
        Bound.AT_LEAST,
    ),
    "effect_share": Measure(
        "distance from 1 of the share of that effect which arrives, beyond what rounding does; at most",
        "{value:.2%} of the adapter's effect arrives; 100 % to within {limit:.2%} is expected",
        Bound.AROUND_ONE,
    ),
    "weights": Measure(
        "of quantized weights, how much farther a stored number is from the base's than the nearest of its block's "
        "grid, over the grid's range; at most",
        "a stored weight is {value:.2e} of its block's range farther from the base's than it need be; at most "
        "{limit:.0e} is rounding",
    ),
    "scales": Measure(
        "of quantized weights, how far a grid's range is from that of its block, relative; at most",
        "a block's scale is off by {value:.2e} of it; at most {limit:.0e} is rounding",
    ),
    "clipping": Measure(
        "of quantized weights, how much farther than a step (half a step where blocks have zeros) a stored number is "
        "from the base's, over the grid's range; at most",
        "a block's grid does not reach a weight: it lies {value:.2e} of its range off; at most {limit:.0e} is rounding",
    ),
    "cost_kl": Measure(
        "what quantization costs: mean Kullback-Leibler divergence from the base's floats, nats; at most",
        "quantization costs {value:.3g} nats; at most {limit:g} was asked for",
    ),
    "cost_top1": Measure(
        "likewise, share of positions with the same best class; at least",
        "{value:.2%} of positions keep their best class; {limit:.1%} was asked for",
        Bound.SHARE_AT_LEAST,
    ),
    "cost_perplexity": Measure(
        "likewise, by how much of it the perplexity rises; at most",
        "the perplexity rises by {value:.2%}; at most {limit:.2%} was asked for",
    ),
    "cost_effect": Measure(
        "likewise, distance from 1 of the share of the adapter's effect that is kept; at most",
        "{value:.2%} of the adapter's effect is kept; 100 % to within {limit:.2%} was asked for",
        Bound.AROUND_ONE,
    ),
}
# PyTorch and the export multiply the same integers, and round what they multiply by to 8 bits.
INT8 = "int8"
COSTS = ("cost_kl", "cost_top1", "cost_perplexity", "cost_effect")
# Measures of quantized exports alone.
_OF_INTEGERS = ("weights", "scales", "clipping", *COSTS)

_ANY = ("float32", "float16", "bfloat16", INT8)
_HALF = ("float16", "bfloat16", INT8)
_BOTH = ("cpu", "cuda")
# Measure, dtypes, providers, limit, reason; the first row that fits counts.
_TABLE = (
    ("error", ("float32",), ("cpu",), 1e-4, "float32 rounding through a deep network stays near 1e-6"),
    ("error", ("float32",), ("cuda",), 1e-3, "a GPU sums in other orders; TF32 is off"),
    ("error", _HALF, _BOTH, None, "the largest of many roundings says little; the distributions gate"),
    ("features", ("float32",), ("cpu",), 1e-4, "as the error of logits"),
    ("features", ("float32",), ("cuda",), 1e-3, "as the error of logits"),
    ("features", ("float16",), _BOTH, 2e-2, "11-bit significands: errors of 1e-3 a layer, over a dozen layers"),
    ("features", ("bfloat16",), _BOTH, 1e-1, "8-bit significands: eight times float16's rounding, less with depth"),
    ("features", (INT8,), _BOTH, None, "as the error of logits"),
    ("rounding", ("float32",), _BOTH, 4.0, "seen on a CPU: 0.8 to 1.9; sums in another order, a coarser exp and erf"),
    ("rounding", (INT8,), _BOTH, 1.5, "seen on a CPU: 1.00; both sides round the same operands"),
    ("rounding", _HALF, _BOTH, 2.0, "seen on a CPU: 0.6 to 1.1; as many roundings to the dtype, or fewer"),
    ("kl", ("float32",), _BOTH, None, "the error gates"),
    ("kl", ("float16",), _BOTH, 1e-3, "errors of up to 4e-2 in the logits, squared and halved"),
    ("kl", ("bfloat16",), _BOTH, 1e-2, "8 times as coarse, and squared; ten times float16's, not 64"),
    ("kl", (INT8,), _BOTH, None, "the rounding gates, as it knows how much this model loses"),
    ("top1", ("float32",), _BOTH, 0.999, "a flip beyond the noise is an error; one in a thousand may sit at its edge"),
    ("top1", ("float16",), _BOTH, 0.99, "as float32, with a wider edge"),
    ("top1", ("bfloat16",), _BOTH, 0.98, "as float16, with a wider edge"),
    ("top1", (INT8,), _BOTH, 0.98, "as bfloat16, whose significand is as short"),
    ("perplexity", ("float32",), _BOTH, 1e-4, "a mean over positions of errors near 1e-6"),
    ("perplexity", ("float16",), _BOTH, 1e-2, "a mean of errors of either sign of some 1e-2"),
    ("perplexity", ("bfloat16",), _BOTH, 5e-2, "five times float16's; the errors are eight times as large"),
    ("perplexity", (INT8,), _BOTH, None, "as the divergence"),
    ("effect", ("float32",), _BOTH, 10.0, "an effect within a few errors cannot be told from none"),
    ("effect", _HALF, _BOTH, None, "a weak effect is a few roundings in one place, clear over all: effect_share gates"),
    ("effect_share", ("float32",), ("cpu",), 1e-4, "as the error"),
    ("effect_share", ("float32",), ("cuda",), 1e-3, "as the error"),
    ("effect_share", ("float16",), _BOTH, 1e-3, "two roundings of factors that were scaled, multiplied and stored"),
    ("effect_share", ("bfloat16",), _BOTH, 8e-3, "as float16, at eight times the rounding"),
    ("effect_share", (INT8,), _BOTH, 2e-2, "as bfloat16, with a product's operand rounded once more at each layer"),
    ("weights", ("float32",), _BOTH, 2e-6, "16 roundings of a sum that PEFT merges in another order"),
    ("weights", ("float16",), _BOTH, 2e-3, "one rounding either way to the dtype before the integers"),
    ("weights", ("bfloat16",), _BOTH, 1.6e-2, "as float16, at eight times the rounding"),
    ("scales", ("float32",), _BOTH, 2e-6, "as the weights"),
    ("scales", ("float16",), _BOTH, 2e-3, "as the weights, and a rounding of the scale"),
    ("scales", ("bfloat16",), _BOTH, 1.6e-2, "as float16, at eight times the rounding"),
    ("clipping", ("float32",), _BOTH, 2e-6, "as the weights"),
    ("clipping", ("float16",), _BOTH, 2e-3, "as the weights, and a rounding of the scale"),
    ("clipping", ("bfloat16",), _BOTH, 1.6e-2, "as float16, at eight times the rounding"),
    ("weights", (INT8,), _BOTH, None, "the same weights as without rounded activations"),
    ("scales", (INT8,), _BOTH, None, "the same weights as without rounded activations"),
    ("clipping", (INT8,), _BOTH, None, "the same weights as without rounded activations"),
    *((name, _ANY, _BOTH, None, "for the user to say") for name in COSTS),
)
_EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7, INT8: 2.0**-7}


@dataclass(frozen=True)
class Tolerances:
    """The limits of one dtype on one provider; None where nothing limits a measure. See `MEASURES`.

    Attributes:
        epsilon: Distance from 1 to the next number of the dtype.
        noise: Multiple of PyTorch's rounding that outputs may be off by: the table's for `rounding`, not a given one.
        recorded: The same limits with their reasons, to be recorded.
    """

    error: float | None
    features: float | None
    rounding: float | None
    kl: float | None
    top1: float | None
    perplexity: float | None
    effect: float | None
    effect_share: float | None
    weights: float | None = None
    scales: float | None = None
    clipping: float | None = None
    cost_kl: float | None = None
    cost_top1: float | None = None
    cost_perplexity: float | None = None
    cost_effect: float | None = None
    epsilon: float = 2.0**-23
    noise: float = 2.0
    recorded: tuple[Limit, ...] = ()


def tolerances(
    dtype: str, provider: str, overrides: Mapping[str, float] | None = None, *, quantized: bool = False
) -> Tolerances:
    """The limits for an export of `dtype` run on `provider` ("cpu" or "cuda").

    Args:
        overrides: Limits to put in place of the table's, by measure.
        quantized: Whether its weights are, which has measures of its own.

    Raises:
        UsageProblem: An override names no measure.
    """
    given = dict(overrides or {})
    measures = [name for name in MEASURES if quantized or name not in _OF_INTEGERS]
    unknown = sorted(set(given) - set(measures))
    if unknown:
        raise UsageProblem(
            "A tolerance is for a measure that there is not",
            where="--tolerance",
            expected=", ".join(measures),
            found=", ".join(unknown),
        )
    limits = tuple(_limit(measure, dtype, provider, given=given) for measure in MEASURES)
    noise = _limit("rounding", dtype, provider, given={}).limit
    return Tolerances(
        **{each.measure: each.limit for each in limits},
        epsilon=_EPSILON[dtype],
        noise=noise,
        recorded=tuple(each for each in limits if each.measure in measures),
    )


def _limit(measure: str, dtype: str, provider: str, *, given: Mapping[str, float]) -> Limit:
    row = next(row for row in _TABLE if row[0] == measure and dtype in row[1] and provider in row[2])
    if measure in given:
        return Limit(measure, given[measure], f"given; the table says {_shown(row[3])}: {row[4]}", overridden=True)
    return Limit(measure, row[3], row[4])


def _shown(limit: float | None) -> str:
    return "none" if limit is None else f"{limit:g}"


def holds(measure: str, value: float, limit: float) -> bool:
    """Whether `value` of the measure is within `limit`; NaN never is."""
    match MEASURES[measure].bound:
        case Bound.AT_MOST:
            return value <= limit
        case Bound.AT_LEAST | Bound.SHARE_AT_LEAST:
            return value >= limit
        case Bound.AROUND_ONE:
            return abs(value - 1) <= limit
        case bound:
            assert_never(bound)


def used(measure: str, value: float, limit: float) -> float:
    """How much of what `limit` allows `value` takes: 0.31 for 31 %, above 1 beyond the limit, infinite for NaN.

    Of a share that must be at least 0.999, 0.9996 takes 0.4: what is missing over what may be missing.
    """
    match MEASURES[measure].bound:
        case Bound.AT_MOST:
            taken, allowed = value, limit
        case Bound.AT_LEAST:
            taken, allowed = limit, value
        case Bound.SHARE_AT_LEAST:
            taken, allowed = 1 - value, 1 - limit
        case Bound.AROUND_ONE:
            taken, allowed = abs(value - 1), limit
        case bound:
            assert_never(bound)
    if math.isnan(value):
        return math.inf
    if taken <= 0:
        return 0.0
    return taken / allowed if allowed > 0 else math.inf


def markdown_table() -> str:
    """The limits on the CPU provider as Markdown, for the docs; kept equal to it by a test."""
    by_dtype = {dtype: tolerances(dtype, "cpu", quantized=True).recorded for dtype in _ANY}
    lines = ["| measure | " + " | ".join(by_dtype) + " | |", "|---|" + "---:|" * len(by_dtype) + "---|"]
    for number, (measure, measured) in enumerate(MEASURES.items()):
        shown = [_shown(of[number].limit).replace("none", "–") for of in by_dtype.values()]
        lines.append(f"| `{measure}` | {' | '.join(shown)} | {measured.meaning} |")
    return "\n".join(lines) + "\n"
