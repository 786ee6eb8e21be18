"""The report for a terminal: no colour codes, at most `WIDTH` columns."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from lora_export.bench.results import BenchReport
from lora_export.check.results import CheckReport
from lora_export.report import allowances, summary
from lora_export.report import format as fmt
from lora_export.report.as_json import Report
from lora_export.report.bench_tables import (
    difference_table,
    latency_table,
    memory_table,
    placement_sentences,
    ratio_table,
    swap_table,
    variant_sentences,
)
from lora_export.report.check_tables import case_table, cost_table, perplexity_table
from lora_export.report.layer_tables import divergence_table, layer_summary, reproduction_sentences, unseen_sentences
from lora_export.report.provenance import against_facts, environment_facts, size_table, subject_facts
from lora_export.report.summary import MARKS, Finding
from lora_export.report.tables import Table, TableRow
from lora_export.verdict import Environment, Subject, Verdict

WIDTH = 110
_GAP = 2
_LEAST_NAME_WIDTH = 12


def render_check_text(report: CheckReport) -> str:
    """The check as text, verdict first; ends with a line break."""
    blocks = [
        _opening(report, summary.check_headline(report), summary.check_summary(report)),
        _table(case_table(report)),
        _table(perplexity_table(report)),
        _table(cost_table(report)),
        _findings(summary.check_findings(report)),
        _table(divergence_table(report.divergence)),
        _bullets("To see it", reproduction_sentences(report)),
        _table(layer_summary(report)),
        _bullets("Without an error of their own", unseen_sentences(report)),
        _bullets("Not compared", report.skipped),
        _bullets("Data", report.data),
        _bullets("Limits given", tuple(summary.given_limits(report))),
        _where(report.subject, report.environment, report.seconds),
    ]
    return _joined(blocks)


def render_bench_text(report: BenchReport) -> str:
    """The bench as text, verdict first; ends with a line break."""
    swap = swap_table(report)
    blocks = [
        _opening(report, allowances.bench_headline(report), allowances.bench_summary(report)),
        _table(ratio_table(report)),
        _table(difference_table(report)),
        *(_table(latency_table(workload)) for workload in report.workloads),
        _bullets("What was timed", variant_sentences(report)),
        _table(swap) if swap.rows else summary.swap_sentence(report),
        _table(memory_table(report)),
        _bullets("Operators by provider", placement_sentences(report)),
        _table(size_table(report.subject)),
        _findings(summary.bench_findings(report)),
        _bullets("Notes", report.notes),
        _where(report.subject, report.environment, report.seconds, more=against_facts(report.against)),
    ]
    return _joined(blocks)


def _joined(blocks: list[str]) -> str:
    return "\n\n".join(block for block in blocks if block) + "\n"


def _opening(report: Report, headline: str, sentence: str) -> str:
    labels = [line for label in summary.labels(report) for line in _wrapped(f"! {label}")]
    return "\n".join([f"{MARKS[report.verdict]} {report.verdict.upper()}: {headline}", *_wrapped(sentence), *labels])


def _wrapped(text: str, first: str = "", rest: str | None = None) -> list[str]:
    rest = " " * len(first) if rest is None else rest
    return textwrap.wrap(fmt.plain(text), WIDTH, initial_indent=first, subsequent_indent=rest) or [first.rstrip()]


def _bullets(title: str, sentences: tuple[str, ...]) -> str:
    lines = [line for sentence in sentences for line in _wrapped(sentence, "  - ")]
    return "\n".join([title, *lines]) if lines else ""


def _findings(findings: tuple[Finding, ...]) -> str:
    lines = []
    for finding in findings:
        lines += _wrapped(f"{MARKS[finding.verdict]} {finding.name}: {finding.verdict}", "  ", "    ")
        lines += [line for sentence in finding.sentences for line in _wrapped(sentence, "    ")]
    return "\n".join(["Findings", *lines]) if lines else ""


def _where(
    subject: Subject, environment: Environment, seconds: float, *, more: tuple[tuple[str, str], ...] = ()
) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in sorted(environment.versions.items()))
    duration = ("Duration", fmt.duration(seconds))
    facts = [*subject_facts(subject), *more, *environment_facts(environment), duration, ("Versions", versions)]
    blocks = (_pairs("Where", facts), _pairs("Settings", sorted(environment.settings.items())))
    return "\n\n".join(block for block in blocks if block)


def _pairs(title: str, pairs: Sequence[tuple[str, str]]) -> str:
    """A name and its value in each line; none for an empty value."""
    given = [(name, value) for name, value in pairs if value]
    width = max((len(name) for name, _ in given), default=0)
    lines = [line for name, value in given for line in _wrapped(value, f"  {name:<{width}}  ")]
    return "\n".join([title, *lines]) if lines else ""


def _table(table: Table) -> str:
    """Aligned columns; a first cell that does not fit goes on in the next line, so that no name is cut."""
    if not table.rows:
        return ""
    table = table.narrow()
    widths = [
        max(len(column.title), *(len(fmt.plain(row.cells[i].text)) for row in table.rows))
        for i, column in enumerate(table.columns)
    ]
    room = WIDTH - sum(widths[1:]) - _GAP * len(widths)
    widths[0] = max(min(widths[0], room), _LEAST_NAME_WIDTH)
    lines = [table.caption, *_line(table, [column.title for column in table.columns], widths)]
    for group, rows in table.groups().items():
        lines += _wrapped(group) if group else []
        lines += [line for row in rows for line in _line(table, _texts(row), widths)]
    return "\n".join(lines)


def _texts(row: TableRow) -> list[str]:
    return [cell.text.upper() if cell.verdict is Verdict.FAIL else fmt.plain(cell.text) for cell in row.cells]


def _line(table: Table, texts: list[str], widths: list[int]) -> list[str]:
    name, *more = textwrap.wrap(texts[0], widths[0], subsequent_indent=" " * _GAP) or [""]
    cells = [
        f"{text:>{width}}" if column.numeric else f"{text:<{width}}"
        for text, width, column in zip(texts[1:], widths[1:], table.columns[1:], strict=True)
    ]
    first = (" " * _GAP).join([f"{name:<{widths[0]}}", *cells])
    return [(" " * _GAP + line).rstrip() for line in (first, *more)]
