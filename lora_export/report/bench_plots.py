"""The plots of a `bench`: latency samples by variant, and ratios with their intervals."""

from __future__ import annotations

import math

from lora_export.bench.results import BenchReport, Ratio, Variant, Workload
from lora_export.report import format as fmt
from lora_export.report.allowances import ratio_name
from lora_export.report.summary import MARKS
from lora_export.report.svg import Axis, Plot
from lora_export.verdict import Verdict

MOST_DOTS = 120
# An axis that showed every straggler would squeeze what there is to see.
_AXIS_QUANTILE, _AXIS_REACH = 0.95, 1.5
_GOLDEN = 0.618034
_JITTER = 14

_STYLES = {Verdict.FAIL: "failed", Verdict.AMBIGUOUS: "ambiguous"}


def latency_plot(workload: Workload, number: int) -> str:
    """An SVG with a strip of samples for each variant, in milliseconds; `number` sets it apart within the page."""
    finite = [s for variant in workload.variants for s in variant.samples_ms if math.isfinite(s)]
    if not finite:
        return ""
    low, high = min(finite), _upper_bound(workload, finite)
    margin = 0.04 * (high - low) or 0.05 * high or 1.0
    axis = Axis(max(low - margin, 0.0), high + margin)
    description = (
        "Strip plot with one row for each variant: a dot for each run, a box over the middle half, a stroke at the "
        f"median. The table “Latency of {workload.name}” holds the same numbers."
    )
    title = f"Latency of {workload.name} by variant"
    plot = Plot(f"latency-{number}", title, description, axis=axis, axis_title="milliseconds per run")
    for variant in workload.variants:
        _draw_strip(plot, variant)
    return plot.markup()


def _upper_bound(workload: Workload, samples: list[float]) -> float:
    """The slowest run but for those far beyond nearly all others."""
    usual = max(fmt.quantile(variant.samples_ms, _AXIS_QUANTILE) for variant in workload.variants if variant.samples_ms)
    return max((sample for sample in samples if sample <= usual * _AXIS_REACH), default=max(samples))


def _draw_strip(plot: Plot, variant: Variant) -> None:
    samples = tuple(sample for sample in variant.samples_ms if math.isfinite(sample))
    n_beyond = sum(sample > plot.axis.high for sample in samples)
    beyond = f"{fmt.counted(n_beyond, 'run')} off the scale, median" if n_beyond else "median"
    y = plot.row(variant.name, fmt.milliseconds(variant.median_ms), beyond)
    if not samples:
        plot.note("no runs", y)
        return
    plot.band(fmt.quantile(samples, 0.25), fmt.quantile(samples, 0.75), y, height=18, style="box")
    for n, sample in enumerate(thinned(samples)):
        if sample <= plot.axis.high:
            plot.dot(sample, y + _JITTER * ((n * _GOLDEN) % 1 - 0.5), 2, style="sample")
    plot.bar(variant.median_ms, y, 22, style="median")


def thinned(samples: tuple[float, ...]) -> list[float]:
    """At most `MOST_DOTS` samples, evenly over the order of size, with the fastest and the slowest."""
    ordered = sorted(samples)
    if len(ordered) <= MOST_DOTS:
        return ordered
    return [ordered[round(n * (len(ordered) - 1) / (MOST_DOTS - 1))] for n in range(MOST_DOTS)]


def ratio_plot(report: BenchReport) -> str:
    """An SVG with one interval for each ratio around 1; empty without any ratio."""
    ratios = [ratio for workload in report.workloads for ratio in workload.ratios]
    bounds = [bound for ratio in ratios for bound in (ratio.low, ratio.high, ratio.median, ratio.allowance)]
    shown = [bound for bound in bounds if bound is not None and math.isfinite(bound)]
    if not shown:
        return ""
    low, high = min(1.0, *shown), max(1.0, *shown)
    margin = 0.06 * (high - low) or 0.05
    description = (
        "Interval plot with one row for each latency ratio: a diamond at the median, a line over its confidence "
        "interval, a stroke at the allowance where there is one, and a line through all rows at 1, equal latency. "
        "The table “Latency ratios” holds the same numbers."
    )
    axis = Axis(low - margin, high + margin)
    plot = Plot("ratios", "Latency ratios with intervals", description, axis=axis, axis_title="ratio of latencies")
    plot.reference(1.0, "equal")
    for workload in report.workloads:
        if workload.ratios:
            plot.heading(workload.name)
        for ratio in workload.ratios:
            _draw_interval(plot, ratio)
    return plot.markup()


def _draw_interval(plot: Plot, ratio: Ratio) -> None:
    result = f"{fmt.ratio(ratio.median)} {MARKS[ratio.verdict]}"
    y = plot.row(ratio_name(ratio), result, str(ratio.verdict), style=_STYLES.get(ratio.verdict, ""))
    if not all(map(math.isfinite, (ratio.low, ratio.median, ratio.high))):
        plot.note(f"median {fmt.ratio(ratio.median)}, interval {fmt.interval(ratio.low, ratio.high)}", y)
        return
    if ratio.allowance is not None and math.isfinite(ratio.allowance):
        plot.band(plot.axis.low, ratio.allowance, y, height=10, style="allowed")
        plot.bar(ratio.allowance, y, 18, style="limit")
    plot.span(ratio.low, ratio.high, y, style="interval")
    for bound in (ratio.low, ratio.high):
        plot.bar(bound, y, 10, style="interval")
    plot.diamond(ratio.median, y, "effect")
