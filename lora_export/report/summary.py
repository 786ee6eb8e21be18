"""Headline, one-sentence summary, key figures and findings of a report, in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lora_export.report import format as fmt
from lora_export.verify.bench_results import BenchReport, Ratio, Workload
from lora_export.verify.check_results import CheckReport, ParityCase
from lora_export.verify.results import Verdict

# Shown beside the word, so that no verdict is told by colour alone.
MARKS = {Verdict.PASS: "✓", Verdict.FAIL: "✕", Verdict.AMBIGUOUS: "?", Verdict.NOT_GATED: "·"}

_CHECK_HEADLINES = {Verdict.PASS: "Parity check passed", Verdict.FAIL: "Parity check failed"}
_BENCH_HEADLINES = {
    Verdict.PASS: "Latency is within the allowance",
    Verdict.FAIL: "Latency exceeds the allowance",
    Verdict.AMBIGUOUS: "Latency is undecided",
    Verdict.NOT_GATED: "Latency was measured, not gated",
}


@dataclass(frozen=True)
class Finding:
    """What failed or stayed undecided: where, and why in full sentences."""

    name: str
    verdict: Verdict
    sentences: tuple[str, ...]


def case_verdict(case: ParityCase) -> Verdict:
    return Verdict.PASS if case.passed else Verdict.FAIL


def ratio_name(ratio: Ratio) -> str:
    return f"{ratio.variant} ÷ {ratio.against}"


def check_headline(report: CheckReport) -> str:
    return _CHECK_HEADLINES[report.verdict] if report.cases else "Nothing was compared"


def bench_headline(report: BenchReport) -> str:
    return _BENCH_HEADLINES[report.verdict]


def check_summary(report: CheckReport) -> str:
    if not report.cases:
        return "The check holds no comparison, so it says nothing about the export."
    n_failed = sum(not case.passed for case in report.cases)
    if n_failed:
        compared = fmt.counted(len(report.cases), "comparison")
        return f"{n_failed} of {compared} with the reference failed; the reasons follow."
    passed = "The comparison" if len(report.cases) == 1 else f"All {len(report.cases)} comparisons"
    sentence = f"{passed} with the reference stayed within the tolerances"
    nearest = max(_tolerance_use(report), key=lambda entry: entry[0], default=None)
    if nearest is not None:
        used, name = nearest
        sentence += f"; nearest to its limit is “{fmt.plain(name)}”, with {_percent(used)} of the tolerated error"
    return sentence + "."


def _tolerance_use(report: CheckReport) -> list[tuple[float, str]]:
    """Error over tolerance of every case that gates on it, with its name."""
    uses = [(case.error_relative / case.tolerance, case.name) for case in report.cases if case.tolerance]
    return [(used, name) for used, name in uses if math.isfinite(used)]


def _percent(used: float) -> str:
    return f"{100 * used:.0f}%" if used >= 0.01 else "less than 1%"


def check_figures(report: CheckReport) -> tuple[tuple[str, str], ...]:
    """Label and value of what the top of a report shows."""
    n_passed = sum(case.passed for case in report.cases)
    figures = [("Comparisons passed", f"{n_passed} of {len(report.cases)}")]
    errors = [case.error_relative for case in report.cases]
    if errors:
        figures.append(("Largest relative error", fmt.scientific(_worst(max, errors))))
    roundings = [case.rounding_ratio for case in report.cases if case.rounding_ratio is not None]
    if roundings:
        figures.append(("Largest error ÷ PyTorch's rounding", fmt.factor(_worst(max, roundings))))
    ratios = [case.effect_ratio for case in report.cases if case.effect_ratio is not None]
    if ratios:
        figures.append(("Smallest effect ÷ error", fmt.multiple(_worst(min, ratios))))
    return (*figures, ("Duration", fmt.duration(report.seconds)))


def _worst(choose: Callable[[list[float]], float], values: list[float]) -> float:
    """The extreme value; NaN if there is one, which min and max may pass over depending on the order."""
    return math.nan if any(map(math.isnan, values)) else choose(values)


def given_gates(report: CheckReport) -> Iterator[str]:
    """Limits that the user gave in place of the table's."""
    for gate in report.gates:
        if gate.overridden:
            yield f"{gate.measure}: {gate.limit:g} ({gate.reason})"


def check_findings(report: CheckReport) -> tuple[Finding, ...]:
    return tuple(Finding(case.name, Verdict.FAIL, case.failures) for case in report.cases if not case.passed)


def bench_summary(report: BenchReport) -> str:
    ratios = [ratio for workload in report.workloads for ratio in workload.ratios]
    gated = [ratio for ratio in ratios if ratio.verdict is not Verdict.NOT_GATED]
    if not gated:
        measured = fmt.counted(len(report.workloads), "workload")
        return f"No latency ratio has an allowance; the figures for {measured} are for information."
    worst = max(gated, key=lambda ratio: math.inf if math.isnan(ratio.median) else ratio.median)
    largest = f"the largest is {fmt.ratio(worst.median)} ({fmt.plain(ratio_name(worst))})"
    of = fmt.counted(len(gated), "gated latency ratio")
    counts = {verdict: sum(ratio.verdict is verdict for ratio in gated) for verdict in Verdict}
    if report.verdict is Verdict.PASS:
        who = "The only gated latency ratio is" if len(gated) == 1 else f"All {of} are"
        return f"{who} within the allowance; {largest}."
    states = {Verdict.FAIL: "above the allowance", Verdict.AMBIGUOUS: "undecided"}
    parts = [f"{counts[v]} {'is' if counts[v] == 1 else 'are'} {words}" for v, words in states.items() if counts[v]]
    return f"Of {of}, {fmt.listed(parts)}; {largest}."


def bench_figures(report: BenchReport) -> tuple[tuple[str, str], ...]:
    """Label and value of what the top of a report shows."""
    n_ratios = sum(len(workload.ratios) for workload in report.workloads)
    figures = [("Workloads", str(len(report.workloads))), ("Latency ratios", str(n_ratios))]
    if report.swap is not None:
        figures.append(("Adapter swap, held", fmt.microseconds(report.swap.bound_us)))
    return (*figures, ("Duration", fmt.duration(report.seconds)))


def bench_findings(report: BenchReport) -> tuple[Finding, ...]:
    return tuple(
        Finding(f"{ratio_name(ratio)}, {workload.name}", ratio.verdict, (ratio_sentence(ratio),))
        for verdict in (Verdict.FAIL, Verdict.AMBIGUOUS)
        for workload in report.workloads
        for ratio in workload.ratios
        if ratio.verdict is verdict
    )


def ratio_sentence(ratio: Ratio) -> str:
    interval = f"its {fmt.share(ratio.confidence)} interval is {fmt.interval(ratio.low, ratio.high)}"
    sentence = f"The median ratio is {fmt.ratio(ratio.median)}; {interval}"
    if ratio.allowance is None:
        return f"{sentence}."
    allowance = f"the allowance of {fmt.ratio(ratio.allowance)}"
    if ratio.low > ratio.allowance:
        return f"{sentence}, wholly above {allowance}."
    if ratio.low <= ratio.allowance < ratio.high:
        return f"{sentence}, which holds {allowance}, so more blocks are needed to decide."
    return f"{sentence}, against {allowance}."


def swap_sentence(report: BenchReport) -> str:
    """What changing the adapter costs; says so if it was not measured."""
    swap = report.swap
    if swap is None:
        return "Changing the adapter was not measured."
    return (
        f"Changing to an adapter that the session holds takes {fmt.microseconds(swap.bound_us)}; "
        f"to one read from its file first, {fmt.microseconds(swap.loaded_us)} "
        f"(medians over {fmt.counted(swap.n, 'swap')})."
    )


def workload_title(workload: Workload) -> str:
    """The workload's own name, with what its numbers mean."""
    rows = fmt.counted(workload.batch, "row" if workload.sequence else "image")
    if not workload.sequence:
        return rows
    past = f", on {fmt.counted(workload.past, 'cached token')}" if workload.past else ""
    return f"{rows} of {fmt.counted(workload.sequence, 'token')}{past}"
