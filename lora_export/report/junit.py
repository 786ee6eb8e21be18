"""The report as JUnit XML: what Jenkins, GitLab, Azure and GitHub's test reporters read.

Within Jenkins' strict schema (`junit-10.xsd`), which knows properties of a suite but not of a case: a case's figures
stand in its `system-out`, one `name=value` a line, and among the suite's properties as `<group>/<case>/<name>`.

A failed comparison or ratio is a failure; an undecided ratio, and what was not compared, is skipped with its reason.
What stopped a check or a bench before its end is an error.
"""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass

from lora_export.bench.results import BenchReport, Ratio, Variant, Workload
from lora_export.check.results import CheckReport, ParityCase
from lora_export.report import allowances, summary
from lora_export.report import format as fmt
from lora_export.report.as_json import Report
from lora_export.report.layer_tables import reproduction_sentences, where_sentences
from lora_export.report.provenance import environment_facts, subject_facts
from lora_export.verdict import Verdict

# Neither may stand in XML 1.0, and `fmt.plain` lets them pass.
_NOT_XML = re.compile("[\ufffe\uffff]")
_RATIO_FIGURES = ("median", "low", "high", "confidence", "allowance")
_SWAP_FIGURES = ("median_us", "low_us", "high_us", "confidence", "allowance_us")
_MEMORY_FIGURES = ("peak_mb", "allowance_mb")
_DIFFERENCE_FIGURES = ("largest", "share", "allowance")


@dataclass(frozen=True)
class _TestCase:
    """One `<testcase>`; `verdict` FAIL and AMBIGUOUS need `reasons`."""

    group: str
    name: str
    verdict: Verdict
    reasons: tuple[str, ...] = ()
    figures: tuple[tuple[str, str], ...] = ()
    seconds: float | None = None


def render_check_junit(report: CheckReport) -> str:
    """The check as one suite with a test case for each comparison."""
    cases = [_parity_case(report, case) for case in report.cases]
    if not cases and not report.partial:
        cases = [_TestCase("check", "comparisons", Verdict.FAIL, (summary.check_summary(report),))]
    cases += [
        _TestCase("not compared", sentence.partition(":")[0], Verdict.NOT_GATED, (sentence,))
        for sentence in report.skipped
    ]
    return _rendered("check", report, cases)


def render_bench_junit(report: BenchReport) -> str:
    """The bench as one suite with a test case for each variant of each workload, each swap, peak and difference."""
    cases = [case for workload in report.workloads for case in _workload_cases(workload)]
    cases += [
        _gated_case("swap", allowances.swap_name(swap), swap.verdict, sentence=allowances.swap_verdict_sentence(swap),
                    figures=_figures(swap, _SWAP_FIGURES))
        for swap in report.swaps
    ]  # fmt: skip
    cases += [
        _gated_case("memory", allowances.memory_name(memory), memory.verdict,
                    sentence=allowances.memory_verdict_sentence(memory), figures=_figures(memory, _MEMORY_FIGURES))
        for memory in report.memory
    ]  # fmt: skip
    cases += [
        _gated_case("difference", allowances.difference_name(each), each.verdict,
                    sentence=allowances.difference_sentence(each), figures=_figures(each, _DIFFERENCE_FIGURES))
        for each in report.differences
    ]  # fmt: skip
    return _rendered("bench", report, cases)


def _workload_cases(workload: Workload) -> list[_TestCase]:
    """A case for each variant, with its ratio to the base; one of its own for a ratio to another export."""
    first = {ratio.variant: ratio for ratio in reversed(workload.ratios)}
    cases = [_variant_case(workload.name, variant, first.get(variant.name)) for variant in workload.variants]
    for ratio in workload.ratios:
        if ratio is not first[ratio.variant]:
            figures = tuple((f"ratio_{name}", value) for name, value in _figures(ratio, _RATIO_FIGURES))
            name = allowances.ratio_name(ratio)
            cases.append(
                _gated_case(
                    workload.name, name, ratio.verdict, sentence=allowances.ratio_sentence(ratio), figures=figures
                )
            )
    return cases


def _gated_case(
    group: str, name: str, verdict: Verdict, *, sentence: str, figures: tuple[tuple[str, str], ...]
) -> _TestCase:
    """Without an allowance the figure is for information, and the case passes."""
    told = verdict in (Verdict.FAIL, Verdict.AMBIGUOUS)
    return _TestCase(group, name, verdict, (f"{name}: {sentence}",) if told else (), figures)


def _parity_case(report: CheckReport, case: ParityCase) -> _TestCase:
    figures = _case_figures(case)
    where = where_sentences(report, case.name)
    reasons = (*case.failures, *where, *(reproduction_sentences(report) if where else ()))
    return _TestCase(case.group, case.name, summary.case_verdict(case), reasons, figures)


def _case_figures(case: ParityCase) -> tuple[tuple[str, str], ...]:
    """Each measure by its name, and its limit."""
    found: dict[str, float | int | None] = {}
    for measured in case.measures:
        found |= {measured.name: measured.value, f"{measured.name}_limit": measured.limit}
    found |= {"largest_error": case.largest_error, "largest_effect": case.largest_effect}
    for name, both in (("perplexity", case.perplexity), ("accuracy", case.accuracy)):
        if both is not None:
            found |= {f"{name}_reference": both.reference, f"{name}_exported": both.exported}
    found["n_rows"] = case.n_rows
    return tuple((name, repr(value)) for name, value in found.items() if value is not None)


def _variant_case(workload: str, variant: Variant, ratio: Ratio | None) -> _TestCase:
    figures = _figures(variant, ("median_ms", "rows_per_second"))
    seconds = variant.median_ms / 1e3
    if ratio is None:
        return _TestCase(workload, variant.name, Verdict.PASS, (), figures, seconds)
    figures += tuple((f"ratio_{name}", value) for name, value in _figures(ratio, _RATIO_FIGURES))
    undecided = ratio.verdict in (Verdict.FAIL, Verdict.AMBIGUOUS)
    reasons = (f"{allowances.ratio_name(ratio)}: {allowances.ratio_sentence(ratio)}",) if undecided else ()
    return _TestCase(workload, variant.name, ratio.verdict, reasons, figures, seconds)


def _figures(values: object, names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Attributes that have a value, as text at full precision."""
    found = ((name, getattr(values, name)) for name in names)
    return tuple((name, repr(value)) for name, value in found if value is not None)


def _rendered(kind: str, report: Report, cases: list[_TestCase]) -> str:
    suite = ET.Element("testsuite")
    facts = [("report", kind), ("schema", str(report.schema)), ("verdict", str(report.verdict))]
    facts += [("scope", report.scope)] if report.scope else []
    facts += [(label.lower(), value) for label, value in _where(report) if value]
    facts += [(f"{case.group}/{case.name}/{name}", value) for case in cases for name, value in case.figures]
    properties = ET.SubElement(suite, "properties")
    for name, value in facts:
        ET.SubElement(properties, "property", {"name": _text(name), "value": _text(value)})
    for case in cases:
        suite.append(_element(kind, case))
    if report.stopped is not None:
        suite.append(_stopped(kind, report))
    if report.scope:
        ET.SubElement(suite, "system-out").text = _text(report.scope)
    counts = {
        "tests": str(len(suite.findall("testcase"))),
        "failures": str(len(suite.findall("testcase/failure"))),
        "errors": str(len(suite.findall("testcase/error"))),
        "time": _seconds(report.seconds, 3),
    }
    name = f"lora-export {kind}"
    suite.attrib |= {"name": name, **counts, "skipped": str(len(suite.findall("testcase/skipped")))}
    suite.set("timestamp", report.environment.started_at)
    root = ET.Element("testsuites", {"name": name, **counts})
    root.append(suite)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=False).join(
        ['<?xml version="1.0" encoding="UTF-8"?>\n', "\n"]
    )


def _stopped(kind: str, report: Report) -> ET.Element:
    """The measurement that raised, as an error: it says nothing of the export."""
    element = ET.Element("testcase", {"classname": f"lora-export.{kind}.{kind}", "name": "runs to its end"})
    message = _text(summary.partial_sentence(report))
    ET.SubElement(element, "error", {"type": "stopped", "message": message}).text = _text(report.stopped)
    return element


def _where(report: Report) -> list[tuple[str, str]]:
    versions = [(f"version {name}", version) for name, version in sorted(report.environment.versions.items())]
    return [*subject_facts(report.subject), *environment_facts(report.environment), *versions]


def _element(kind: str, case: _TestCase) -> ET.Element:
    classname = f"lora-export.{kind}.{case.group.replace('.', '_')}"
    element = ET.Element("testcase", {"classname": _text(classname), "name": _text(case.name)})
    if case.seconds is not None:
        element.set("time", _seconds(case.seconds, 6))
    if case.reasons:
        tag = "failure" if case.verdict is Verdict.FAIL else "skipped"
        outcome = ET.SubElement(element, tag, {"type": str(case.verdict), "message": _text(" ".join(case.reasons))})
        outcome.text = "\n".join(map(_text, case.reasons))
    if case.figures:
        ET.SubElement(element, "system-out").text = "\n".join(_text(f"{name}={value}") for name, value in case.figures)
    return element


def _text(text: str) -> str:
    return _NOT_XML.sub("\ufffd", fmt.plain(text))


def _seconds(value: float, digits: int) -> str:
    """Plain decimals, three for a suite: the schema knows no more, no exponent and no NaN."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "0"
