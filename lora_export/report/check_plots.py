"""The plot of a `check`: how far each error lies below its tolerance and below what the adapter does."""

from __future__ import annotations

import math
from typing import TypeGuard

from lora_export.check.results import CheckReport, ParityCase
from lora_export.report import format as fmt
from lora_export.report.check_tables import cases_by_group
from lora_export.report.summary import MARKS, case_verdict
from lora_export.report.svg import Axis, Plot

_DESCRIPTION = (
    "Dot plot on a logarithmic scale with one row for each comparison: the largest error as a dot, the largest effect "
    "of the adapter as a diamond, joined by a line; a band ends at the tolerance. "
    "The table “All comparisons” holds the same numbers."
)


def parity_plot(report: CheckReport) -> str:
    """An SVG of all comparisons, in logits (or other outputs) as the model gives them; empty without any number."""
    values = [value for case in report.cases for value in (case.error, case.effect, _tolerance(case)) if _drawn(value)]
    if not values:
        return ""
    low = 10.0 ** math.floor(math.log10(min(values)))
    high = 10.0 ** math.ceil(math.log10(max(values)))
    axis = Axis(low, high if high > low else 10 * low, log=True)
    title = "Error against tolerance and adapter effect"
    plot = Plot("parity", title, _DESCRIPTION, axis, "largest absolute difference of the outputs")
    for group, cases in cases_by_group(report).items():
        plot.heading(group)
        for case in cases:
            _draw(plot, case)
    return plot.markup()


def _draw(plot: Plot, case: ParityCase) -> None:
    verdict = case_verdict(case)
    detail = "" if case.effect_ratio is None else "effect ÷ error"
    result = MARKS[verdict] if case.effect_ratio is None else f"{fmt.multiple(case.effect_ratio)} {MARKS[verdict]}"
    y = plot.row(case.name, result, detail, "" if case.passed else "failed")
    if not math.isfinite(case.error):
        plot.note(f"the error is {fmt.scientific(case.error)}", y)
        return
    tolerance = _tolerance(case)
    if _drawn(tolerance):
        plot.band(plot.axis.low, tolerance, y, 10, "allowed")
        plot.bar(tolerance, y, 18, "limit")
    # Equal outputs have no place on a logarithmic axis; an open dot at the border stands for them.
    start = case.error or plot.axis.low
    if _drawn(case.effect):
        plot.span(start, case.effect, y, "reach")
        plot.diamond(case.effect, y, "effect")
    plot.dot(start, y, 5.5, "error" if case.error else "error exact")


def _tolerance(case: ParityCase) -> float | None:
    """The tolerance in the units of the error; where the outputs are equal, the least it can be."""
    if case.tolerance is None:
        return None
    known = math.isfinite(case.error) and math.isfinite(case.error_relative) and case.error_relative > 0
    return case.tolerance * (case.error / case.error_relative if known else 1.0)


def _drawn(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value) and value > 0
