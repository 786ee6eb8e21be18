"""Everything of a bench that an allowance limits, in one form: latency ratios, swaps, peaks of memory, differences."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lora_export.bench.results import BenchReport, Difference, Memory, Ratio, Swap, Workload
from lora_export.report import format as fmt
from lora_export.verdict import Verdict

SWAP_NAMES = {"bound": "held by the session", "loaded": "read from its file first"}
MEMORY_PLACES = {"process": "in the process", "device": "on the GPU"}


@dataclass(frozen=True)
class LimitedFigure:
    """One figure with an allowance.

    Attributes:
        kind: "latency", "adapter swap", "memory" or "difference".
        used: Median, peak or share over the allowance.
    """

    kind: str
    name: str
    verdict: Verdict
    sentence: str
    used: float


def ratio_name(ratio: Ratio) -> str:
    return f"{ratio.variant} ÷ {ratio.against}"


def swap_name(swap: Swap) -> str:
    return f"adapter {SWAP_NAMES[swap.name]}"


def memory_name(memory: Memory) -> str:
    return f"{memory.variant}, {MEMORY_PLACES[memory.place]}"


def difference_name(difference: Difference) -> str:
    return f"{difference.variant} − against, {difference.workload}"


def limited_figures(report: BenchReport) -> tuple[LimitedFigure, ...]:
    """All that have an allowance, in the order of the report."""
    found = [
        _limited(
            "latency",
            f"{ratio_name(ratio)}, {workload.name}",
            ratio,
            sentence=ratio_sentence(ratio),
            used=ratio.median / allowance,
        )
        for workload, ratio in _ratios(report)
        if (allowance := ratio.allowance) is not None
    ]
    found += [
        _limited(
            "adapter swap", swap_name(swap), swap, sentence=swap_verdict_sentence(swap), used=swap.median_us / allowance
        )
        for swap in report.swaps
        if (allowance := swap.allowance_us) is not None
    ]
    found += [
        _limited(
            "memory",
            memory_name(memory),
            memory,
            sentence=memory_verdict_sentence(memory),
            used=memory.peak_mb / allowance,
        )
        for memory in report.memory
        if (allowance := memory.allowance_mb) is not None
    ]
    found += [
        _limited(
            "difference",
            difference_name(each),
            each,
            sentence=difference_sentence(each),
            used=math.nan if each.share is None else each.share / allowance,
        )
        for each in report.differences
        if (allowance := each.allowance) is not None
    ]
    return tuple(found)


def _ratios(report: BenchReport) -> list[tuple[Workload, Ratio]]:
    return [(workload, ratio) for workload in report.workloads for ratio in workload.ratios]


def _limited(
    kind: str, name: str, of: Ratio | Swap | Memory | Difference, *, sentence: str, used: float
) -> LimitedFigure:
    return LimitedFigure(kind, name, of.verdict, sentence, used)


def ratio_sentence(ratio: Ratio) -> str:
    interval = f"its {fmt.share(ratio.confidence)} interval is {fmt.interval(ratio.low, ratio.high)}"
    sentence = f"The median ratio is {fmt.ratio(ratio.median)}; {interval}"
    if ratio.allowance is None:
        return f"{sentence}."
    shown = fmt.ratio(ratio.allowance)
    if ratio.verdict is Verdict.AMBIGUOUS and not ratio.low <= ratio.allowance < ratio.high:
        return f"{sentence}, of too few blocks to decide on the allowance of {shown}."
    return _against_allowance(sentence, ratio.low, ratio.high, allowance=ratio.allowance, shown=shown)


def swap_verdict_sentence(swap: Swap) -> str:
    bounds = f"{fmt.microseconds(swap.low_us)} to {fmt.microseconds(swap.high_us)}"
    sentence = (
        f"The median is {fmt.microseconds(swap.median_us)}; its {fmt.share(swap.confidence)} interval is {bounds}"
    )
    if swap.allowance_us is None:
        return f"{sentence}."
    allowance = fmt.microseconds(swap.allowance_us)
    return _against_allowance(sentence, swap.low_us, swap.high_us, allowance=swap.allowance_us, shown=allowance)


def _against_allowance(sentence: str, low: float, high: float, *, allowance: float, shown: str) -> str:
    if low > allowance:
        return f"{sentence}, wholly above the allowance of {shown}."
    if low <= allowance < high:
        return f"{sentence}, which holds the allowance of {shown}, so {_more_is_needed(sentence)} to decide."
    return f"{sentence}, against the allowance of {shown}."


def _more_is_needed(sentence: str) -> str:
    return "more blocks are needed" if "ratio" in sentence else "a quieter machine is needed"


def memory_verdict_sentence(memory: Memory) -> str:
    peak = f"The peak is {fmt.megabytes(memory.peak_mb)}"
    if memory.allowance_mb is None:
        return f"{peak}."
    relation = "above" if memory.peak_mb > memory.allowance_mb else "within"
    return f"{peak}, {relation} the allowance of {fmt.megabytes(memory.allowance_mb)}."


def difference_sentence(difference: Difference) -> str:
    if not difference.outputs:
        return "The other's outputs cannot be compared: none has the shape of one of this export's."
    outputs = f"{fmt.scientific(difference.largest)}, {fmt.scientific(difference.share)} of the largest value"
    sentence = f"The outputs differ by at most {outputs}"
    if difference.allowance is None:
        return f"{sentence}."
    relation = "within" if difference.verdict is Verdict.PASS else "above"
    return f"{sentence}, {relation} the allowance of {fmt.scientific(difference.allowance)}."


def bench_headline(report: BenchReport) -> str:
    """What of the report decides its verdict, and how."""
    kinds = list(dict.fromkeys(figure.kind for figure in limited_figures(report) if figure.verdict is report.verdict))
    if not kinds:
        return "The bench was stopped before its end" if report.partial else "Latency was measured, not gated"
    who = fmt.listed(kinds).capitalize()
    many = len(kinds) > 1
    match report.verdict:
        case Verdict.FAIL:
            return f"{who} {'exceed' if many else 'exceeds'} the allowance"
        case Verdict.AMBIGUOUS:
            return f"{who} {'are' if many else 'is'} undecided"
        case _:
            return f"{who} {'are' if many else 'is'} within the allowance"


def bench_summary(report: BenchReport) -> str:
    figures = limited_figures(report)
    if not figures:
        measured = fmt.counted(len(report.workloads), "workload")
        return f"Nothing has an allowance; the figures for {measured} are for information."
    worst = max(figures, key=lambda figure: math.inf if math.isnan(figure.used) else figure.used)
    nearest = f"“{fmt.plain(worst.name)}” "
    if math.isnan(worst.used):
        nearest += "has no figure to hold against its allowance"
    else:
        nearest += f"takes the most of its allowance, {_percent(worst.used)}"
    of = fmt.counted(len(figures), "gated figure")
    if report.verdict is Verdict.PASS:
        who = "The only gated figure is" if len(figures) == 1 else f"All {of} are"
        return f"{who} within the allowance; {nearest}."
    counts = {verdict: sum(figure.verdict is verdict for figure in figures) for verdict in Verdict}
    states = {Verdict.FAIL: "above the allowance", Verdict.AMBIGUOUS: "undecided"}
    parts = [f"{counts[v]} {'is' if counts[v] == 1 else 'are'} {words}" for v, words in states.items() if counts[v]]
    if not parts:
        return f"Of {of} known before the bench was stopped, none is above the allowance; {nearest}."
    return f"Of {of}, {fmt.listed(parts)}; {nearest}."


def _percent(used: float) -> str:
    return f"{100 * used:.0f}%" if math.isfinite(used) else fmt.ratio(used)
