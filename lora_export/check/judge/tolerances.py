"""What a parity measure may be, by dtype and provider: one table, a reason for each number.

float32 is judged by the largest error relative to the largest reference magnitude (at least 1). In half precision the
largest of many roundings says little, so distributions are compared instead; where there are no logits, the relative
error is, at what a dozen layers of roundings amount to. At every dtype the export's distance from PyTorch at a wider
dtype may be at most a multiple of PyTorch's own: of all gates the sharpest, as it knows how well the model can be
computed at this dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lora_export.errors import UsageProblem


@dataclass(frozen=True)
class Gate:
    """One limit.

    Attributes:
        measure: What is limited, a name in `MEASURES`.
        limit: None where the measure does not gate at this dtype.
        reason: Why this number.
        overridden: Whether the limit was given by the user.
    """

    measure: str
    limit: float | None
    reason: str
    overridden: bool = False


MEASURES = {
    "error": "largest absolute difference of the logits over max(1, largest absolute reference value); at most",
    "features": "the same for outputs without logits (hidden states, embeddings); at most",
    "rounding": "root mean square of (export − PyTorch at a wider dtype) over that of PyTorch at this dtype; at most",
    "kl": "mean Kullback-Leibler divergence of the distributions, nats; at most",
    "top1": "share of positions with the same best class, flips within the noise aside; at least",
    "perplexity": "relative difference of the perplexities on the data; at most",
    "effect": "what the adapter changes in the reference over the error, else it counts as dropped; at least",
    "effect_share": "distance from 1 of the share of that effect which arrives, beyond what rounding does; at most",
}
_AT_LEAST = ("top1", "effect")

_ANY = ("float32", "float16", "bfloat16")
_HALF = ("float16", "bfloat16")
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
    ("rounding", ("float32",), _BOTH, 4.0, "seen on a CPU: 0.8 to 1.9; sums in another order, a coarser exp and erf"),
    ("rounding", _HALF, _BOTH, 2.0, "seen on a CPU: 0.6 to 1.1; as many roundings to the dtype, or fewer"),
    ("kl", ("float32",), _BOTH, None, "the error gates"),
    ("kl", ("float16",), _BOTH, 1e-3, "errors of up to 4e-2 in the logits, squared and halved"),
    (
        "kl",
        ("bfloat16",),
        _BOTH,
        1e-2,
        "8 times as coarse, and squared; ten times float16's, not 64",
    ),
    ("top1", ("float32",), _BOTH, 0.999, "a flip beyond the noise is an error; one in a thousand may sit at its edge"),
    ("top1", ("float16",), _BOTH, 0.99, "as float32, with a wider edge"),
    ("top1", ("bfloat16",), _BOTH, 0.98, "as float16, with a wider edge"),
    ("perplexity", ("float32",), _BOTH, 1e-4, "a mean over positions of errors near 1e-6"),
    ("perplexity", ("float16",), _BOTH, 1e-2, "a mean of errors of either sign of some 1e-2"),
    ("perplexity", ("bfloat16",), _BOTH, 5e-2, "five times float16's; the errors are eight times as large"),
    ("effect", ("float32",), _BOTH, 10.0, "an effect within a few errors cannot be told from none"),
    ("effect", _HALF, _BOTH, None, "a weak effect is a few roundings in one place, clear over all: effect_share gates"),
    ("effect_share", ("float32",), ("cpu",), 1e-4, "as the error"),
    ("effect_share", ("float32",), ("cuda",), 1e-3, "as the error"),
    ("effect_share", ("float16",), _BOTH, 1e-3, "two roundings of factors that were scaled, multiplied and stored"),
    ("effect_share", ("bfloat16",), _BOTH, 8e-3, "as float16, at eight times the rounding"),
)
_EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


@dataclass(frozen=True)
class Tolerances:
    """The gates of one dtype on one provider; None where a measure does not gate. See `MEASURES`.

    Attributes:
        epsilon: Distance from 1 to the next number of the dtype.
        noise: Multiple of PyTorch's rounding that outputs may be off by: the table's for `rounding`, not a given one.
        gates: The same limits with their reasons, to be recorded.
    """

    error: float | None
    features: float | None
    rounding: float | None
    kl: float | None
    top1: float | None
    perplexity: float | None
    effect: float | None
    effect_share: float | None
    epsilon: float = 2.0**-23
    noise: float = 2.0
    gates: tuple[Gate, ...] = ()


def tolerances(dtype: str, provider: str, overrides: Mapping[str, float] | None = None) -> Tolerances:
    """The gates for an export of `dtype` run on `provider` ("cpu" or "cuda").

    Args:
        overrides: Limits to put in place of the table's, by measure.

    Raises:
        UsageProblem: An override names no measure.
    """
    given = dict(overrides or {})
    unknown = sorted(set(given) - set(MEASURES))
    if unknown:
        raise UsageProblem(
            "A tolerance is for a measure that there is not",
            where="--tolerance",
            expected=", ".join(MEASURES),
            found=", ".join(unknown),
        )
    gates = tuple(_gate(measure, dtype, provider, given) for measure in MEASURES)
    noise = _gate("rounding", dtype, provider, {}).limit
    return Tolerances(**{gate.measure: gate.limit for gate in gates}, epsilon=_EPSILON[dtype], noise=noise, gates=gates)


def _gate(measure: str, dtype: str, provider: str, given: Mapping[str, float]) -> Gate:
    row = next(row for row in _TABLE if row[0] == measure and dtype in row[1] and provider in row[2])
    if measure in given:
        return Gate(measure, given[measure], f"given; the table says {_shown(row[3])}: {row[4]}", overridden=True)
    return Gate(measure, row[3], row[4])


def _shown(limit: float | None) -> str:
    return "none" if limit is None else f"{limit:g}"


def limits_from_below(measure: str) -> bool:
    """Whether the measure must be at least its limit, not at most."""
    return measure in _AT_LEAST


def markdown_table() -> str:
    """The gates on the CPU provider as Markdown, for README; kept equal to it by a test."""
    by_dtype = {dtype: tolerances(dtype, "cpu").gates for dtype in _ANY}
    lines = ["| measure | " + " | ".join(by_dtype) + " | |", "|---|" + "---:|" * len(by_dtype) + "---|"]
    for number, (measure, meaning) in enumerate(MEASURES.items()):
        limits = [_shown(gates[number].limit).replace("none", "–") for gates in by_dtype.values()]
        lines.append(f"| `{measure}` | {' | '.join(limits)} | {meaning} |")
    return "\n".join(lines) + "\n"
