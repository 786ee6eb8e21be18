"""Headline, one-sentence summary, key figures and findings of a report, in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lora_export.bench.results import BenchReport, Workload
from lora_export.check.results import COST, CheckReport, ParityCase
from lora_export.report import format as fmt
from lora_export.report.allowances import SWAP_NAMES, limited_figures
from lora_export.report.layer_tables import where_sentences
from lora_export.report.measure_words import WORDS, measures_by_title, must_be_large
from lora_export.report.widths import wide_sentence
from lora_export.verdict import Verdict

# Shown beside the word, so that no verdict is told by colour alone.
MARKS = {Verdict.PASS: "✓", Verdict.FAIL: "✕", Verdict.AMBIGUOUS: "?", Verdict.NOT_GATED: "·"}

_CHECK_HEADLINES = {
    Verdict.PASS: "Parity check passed",
    Verdict.FAIL: "Parity check failed",
    Verdict.AMBIGUOUS: "Parity check stopped before its end",
}


@dataclass(frozen=True)
class Finding:
    """What failed or stayed undecided: where, and why in full sentences."""

    name: str
    verdict: Verdict
    sentences: tuple[str, ...]


# Cases whose errors are no rounding of the export's own dtype.
_OF_QUANTIZATION = ("deployed", COST)


def case_verdict(case: ParityCase) -> Verdict:
    """What quantization costs is a gate only where the user gave a limit."""
    if case.group == COST and case.passed and case.nearest is None:
        return Verdict.NOT_GATED
    return Verdict.PASS if case.passed else Verdict.FAIL


def _gated(report: CheckReport) -> list[ParityCase]:
    return [case for case in report.cases if case_verdict(case) is not Verdict.NOT_GATED]


def check_headline(report: CheckReport) -> str:
    return _CHECK_HEADLINES[report.verdict] if report.cases else "Nothing was compared"


def check_summary(report: CheckReport) -> str:
    if not report.cases:
        return "The check holds no comparison, so it says nothing about the export."
    n_failed = sum(not case.passed for case in report.cases)
    if n_failed:
        compared = fmt.counted(len(_gated(report)), "comparison")
        return f"{n_failed} of {compared} with the reference failed; the reasons follow."
    n_gated = len(_gated(report))
    passed = "The comparison" if n_gated == 1 else f"All {n_gated} comparisons"
    passed += " made before the check was stopped" if report.partial else " with the reference"
    sentence = f"{passed} stayed within the tolerances"
    limited = [(case.nearest, case) for case in report.cases if case.nearest is not None]
    nearest, case = max(limited, key=lambda entry: entry[0].used, default=(None, None))
    if nearest is not None:
        what = f"the {WORDS[nearest.name].noun} of “{fmt.plain(case.name)}”"
        sentence += f"; nearest to its limit is {what}, with {fmt.used(nearest.used)} of what is allowed"
    return sentence + "."


def partial_sentence(report: CheckReport | BenchReport) -> str:
    """What stopped the measurements; empty where nothing did."""
    if report.stopped is None:
        return ""
    return (
        f"Partial report: stopped by {fmt.plain(report.stopped)}. What was measured before follows; the rest was not."
    )


def labels(report: CheckReport | BenchReport) -> tuple[str, ...]:
    """What limits the whole report, for its top: it is partial, of one device only, or too noisy to tell."""
    wide = wide_sentence(report) if isinstance(report, BenchReport) else ""
    return tuple(filter(None, (partial_sentence(report), report.scope, wide)))


def check_figures(report: CheckReport) -> tuple[tuple[str, str], ...]:
    """Label and value of what the top of a report shows."""
    gated = _gated(report)
    figures = [("Comparisons passed", f"{sum(case.passed for case in gated)} of {len(gated)}")]
    of_graph = [case for case in report.cases if case.group not in _OF_QUANTIZATION]
    for names in measures_by_title().values():
        words = WORDS[names[0]]
        values = [value for case in of_graph if (value := case.value(*names)) is not None]
        if words.figure and values:
            worst = _worst(min if must_be_large(names[0]) else max, values)
            figures.append((words.figure, words.text(worst)))
    return (*figures, ("Duration", fmt.duration(report.seconds)))


def _worst(choose: Callable[[list[float]], float], values: list[float]) -> float:
    """The extreme value; NaN if there is one, which min and max may pass over depending on the order."""
    return math.nan if any(map(math.isnan, values)) else choose(values)


def given_limits(report: CheckReport) -> Iterator[str]:
    """Limits that the user gave in place of the table's."""
    for limit in report.limits:
        if limit.overridden:
            yield f"{limit.measure}: {limit.limit:g} ({limit.reason})"


def check_findings(report: CheckReport) -> tuple[Finding, ...]:
    return tuple(
        Finding(case.name, Verdict.FAIL, (*case.failures, *where_sentences(report, case.name)))
        for case in report.cases
        if not case.passed
    )


def bench_figures(report: BenchReport) -> tuple[tuple[str, str], ...]:
    """Label and value of what the top of a report shows."""
    n_ratios = sum(len(workload.ratios) for workload in report.workloads)
    figures = [("Workloads", str(len(report.workloads))), ("Latency ratios", str(n_ratios))]
    figures += [("Adapter swap, held", fmt.microseconds(s.median_us)) for s in report.swaps if s.name == "bound"]
    return (*figures, ("Duration", fmt.duration(report.seconds)))


def bench_findings(report: BenchReport) -> tuple[Finding, ...]:
    return tuple(
        Finding(figure.name, figure.verdict, (figure.sentence,))
        for verdict in (Verdict.FAIL, Verdict.AMBIGUOUS)
        for figure in limited_figures(report)
        if figure.verdict is verdict
    )


def swap_sentence(report: BenchReport) -> str:
    """What changing the adapter costs; says so if it was not measured."""
    if not report.swaps:
        return "Changing the adapter was not measured: that takes a dynamic export of two."
    parts = [
        f"{fmt.microseconds(swap.median_us)} to one {SWAP_NAMES[swap.name]} "
        f"(median over {fmt.counted(len(swap.samples_us), 'swap')})"
        for swap in report.swaps
    ]
    return f"Changing the adapter takes {fmt.listed(parts)}."


def memory_sentence(report: BenchReport) -> str:
    """What the figures of memory are; empty if there are none."""
    places = dict.fromkeys(memory.place for memory in report.memory)
    means = {
        "process": "in the process, the anonymous memory above what it had before (mapped weights do not count)",
        "device": "on the GPU, all that the process holds there, CUDA's context included",
    }
    what = fmt.listed([means[place] for place in places]) if places else ""
    return f"The most that one session took while it was opened and ran the workloads: {what}." if what else ""


def workload_title(workload: Workload) -> str:
    """The workload's own name, with what its numbers mean."""
    rows = fmt.counted(workload.batch, "row" if workload.sequence else "image")
    if not workload.sequence:
        return rows
    past = f", on {fmt.counted(workload.past, 'cached token')}" if workload.past else ""
    return f"{rows} of {fmt.counted(workload.sequence, 'token')}{past}"
