"""The plot of a `check`: how much of its limit every measure of every comparison takes."""

from __future__ import annotations

import math

from lora_export.check.results import CheckReport, ParityCase
from lora_export.report import format as fmt
from lora_export.report.check_tables import cases_by_group
from lora_export.report.measure_words import WORDS
from lora_export.report.summary import MARKS, case_verdict
from lora_export.report.svg import Axis, Plot

_DESCRIPTION = (
    "Dot plot on a logarithmic scale with one row for each comparison and a dot for each measure that has a limit: how "
    "much of its limit it takes, the one that takes the most being the larger; a band ends at the limit, 100%. What "
    "takes less than a thousandth stands at the left border. The table “All comparisons” holds the same numbers."
)
_LOW, _HIGH, _HIGHEST = 1e-3, 10.0, 1e4


def parity_plot(report: CheckReport) -> str:
    """An SVG of all comparisons; empty where nothing was limited."""
    uses = [measured.used for case in report.cases for measured in case.measures if measured.used is not None]
    if not uses:
        return ""
    most = max((use for use in uses if math.isfinite(use)), default=1.0)
    high = min(max(_HIGH, 10.0 ** math.ceil(math.log10(max(most, _LOW)))), _HIGHEST)
    axis = Axis(_LOW, high, log=True)
    title = "Share of the limit that each measure takes"
    plot = Plot(
        "parity",
        title,
        _DESCRIPTION,
        axis=axis,
        axis_title="measure ÷ its limit",
        axis_detail="(what is missing ÷ what may be, of shares)",
    )
    for group, cases in cases_by_group(report).items():
        plot.heading(group)
        for case in cases:
            _draw(plot, case)
    return plot.markup()


def _draw(plot: Plot, case: ParityCase) -> None:
    nearest, mark = case.nearest, MARKS[case_verdict(case)]
    style = "" if case.passed else "failed"
    if nearest is None:
        plot.note(next(iter(case.failures), "nothing limits it"), plot.row(case.name, mark, "", style=style))
        return
    y = plot.row(case.name, f"{fmt.used(nearest.used)} {mark}", WORDS[nearest.name].noun, style=style)
    if not math.isfinite(nearest.used):
        plot.note(f"the {WORDS[nearest.name].noun} is {WORDS[nearest.name].text(nearest.value)}", y)
        return
    plot.band(plot.axis.low, 1.0, y, height=10, style="allowed")
    plot.bar(1.0, y, 18, style="limit")
    for measured in case.measures:
        if measured is not nearest and measured.used is not None:
            plot.dot(measured.used, y, 3, style="other")
    plot.dot(nearest.used, y, 5.5, style="error")
