"""Headline, one-sentence summary, key figures and findings of a report, in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lora_export.bench.results import BenchReport, Workload
from lora_export.check.results import CheckReport, ParityCase
from lora_export.report import format as fmt
from lora_export.report.gates import SWAP_NAMES, bench_gates
from lora_export.report.layer_tables import where_sentences
from lora_export.verdict import Verdict

# Shown beside the word, so that no verdict is told by colour alone.
MARKS = {Verdict.PASS: "✓", Verdict.FAIL: "✕", Verdict.AMBIGUOUS: "?", Verdict.NOT_GATED: "·"}

_CHECK_HEADLINES = {Verdict.PASS: "Parity check passed", Verdict.FAIL: "Parity check failed"}


@dataclass(frozen=True)
class Finding:
    """What failed or stayed undecided: where, and why in full sentences."""

    name: str
    verdict: Verdict
    sentences: tuple[str, ...]


def case_verdict(case: ParityCase) -> Verdict:
    return Verdict.PASS if case.passed else Verdict.FAIL


def check_headline(report: CheckReport) -> str:
    return _CHECK_HEADLINES[report.verdict] if report.cases else "Nothing was compared"


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
        Finding(gate.name, gate.verdict, (gate.sentence,))
        for verdict in (Verdict.FAIL, Verdict.AMBIGUOUS)
        for gate in bench_gates(report)
        if gate.verdict is verdict
    )


def swap_sentence(report: BenchReport) -> str:
    """What changing the adapter costs; says so if it was not measured."""
    if not report.swaps:
        return "Changing the adapter was not measured."
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
