"""What reports call each measure of a check, how they write its numbers, and on which side of its limit it must be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lora_export.check.judge.tolerances import MEASURES, Bound
from lora_export.check.results import Measured
from lora_export.report import format as fmt


@dataclass(frozen=True)
class MeasureWords:
    """Words for one measure.

    Attributes:
        title: A column's; measures of one title share it.
        noun: What it is in a sentence, without an article.
        text: How a value is written.
        limit_text: How a limit is written; as a value if None.
        wide: Whether its column is left out where width is scarce.
        figure: The label of its worst value at the top of a page; empty if it is not shown there.
    """

    title: str
    noun: str
    text: Callable[[float | None], str]
    limit_text: Callable[[float | None], str] | None = None
    wide: bool = False
    figure: str = ""


_RELATIVE = MeasureWords("Relative", "relative error", fmt.scientific, figure="Largest relative error")
WORDS = {
    "error": _RELATIVE,
    "features": _RELATIVE,
    "rounding": MeasureWords(
        "÷ rounding",
        "error over PyTorch's rounding",
        fmt.factor,
        wide=True,
        figure="Largest error ÷ PyTorch's rounding",
    ),
    "kl": MeasureWords("KL", "KL divergence", fmt.scientific, wide=True),
    "top1": MeasureWords("Top-1", "top-1 agreement", fmt.share, wide=True),
    "perplexity": MeasureWords("Perplexity", "perplexity", fmt.scientific, wide=True),
    "effect": MeasureWords(
        "Effect ÷ error", "effect over error", fmt.multiple, wide=True, figure="Smallest effect ÷ error"
    ),
    "effect_share": MeasureWords("Effect share", "share of the effect", fmt.share, fmt.scientific, wide=True),
    "weights": MeasureWords("Weights", "distance of a stored weight", fmt.scientific, wide=True),
    "scales": MeasureWords("Scales", "error of a scale", fmt.scientific, wide=True),
    "clipping": MeasureWords("Clipping", "clipping of a stored weight", fmt.scientific, wide=True),
    "cost_kl": MeasureWords("KL", "KL divergence", fmt.scientific, wide=True),
    "cost_top1": MeasureWords("Top-1", "top-1 agreement", fmt.share, wide=True),
    "cost_perplexity": MeasureWords("Perplexity", "rise of the perplexity", fmt.scientific, wide=True),
    "cost_effect": MeasureWords("Effect share", "share of the effect kept", fmt.share, fmt.scientific, wide=True),
}
_SIGNS = {Bound.AT_MOST: "≤", Bound.AT_LEAST: "≥", Bound.SHARE_AT_LEAST: "≥", Bound.AROUND_ONE: "±"}


def measures_by_title() -> dict[str, tuple[str, ...]]:
    """The names of the measures that share a title, in the order of the measures."""
    found: dict[str, tuple[str, ...]] = {}
    for name, words in WORDS.items():
        found[words.title] = (*found.get(words.title, ()), name)
    return found


def sign_of(measure: str) -> str:
    return _SIGNS[MEASURES[measure].bound]


def must_be_large(measure: str) -> bool:
    """Whether the smallest value of several is the worst."""
    return MEASURES[measure].bound in (Bound.AT_LEAST, Bound.SHARE_AT_LEAST)


def value_text(measured: Measured) -> str:
    return WORDS[measured.name].text(measured.value)


def limit_text(measured: Measured) -> str:
    """`≤ 1.0e-04`; empty where nothing limits it."""
    words = WORDS[measured.name]
    if measured.limit is None:
        return ""
    return f"{sign_of(measured.name)} {(words.limit_text or words.text)(measured.limit)}"


def against_limit(measured: Measured) -> str:
    """`÷ rounding 1.18× ≤ 4.00×`."""
    return f"{WORDS[measured.name].title} {value_text(measured)} {limit_text(measured)}".rstrip()
