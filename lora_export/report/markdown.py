"""The report as compact Markdown, for the summary of a CI job."""

from __future__ import annotations

import html
import re

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
    variant_sentences,
)
from lora_export.report.check_tables import case_table, cost_table, perplexity_table
from lora_export.report.layer_tables import divergence_table, layer_summary, reproduction_sentences, unseen_sentences
from lora_export.report.provenance import against_facts, environment_facts, subject_facts
from lora_export.report.summary import MARKS, Finding
from lora_export.report.tables import Cell, Table
from lora_export.verdict import Environment, Subject, Verdict

_SYNTAX = re.compile(r"([\\`*_{}\[\]|~#])")


def render_check_markdown(report: CheckReport) -> str:
    """The check as Markdown, verdict first."""
    blocks = [
        _opening(report, summary.check_headline(report), summary.check_summary(report)),
        _findings(summary.check_findings(report)),
        _table(divergence_table(report.divergence)),
        _bullets("To see it", reproduction_sentences(report)),
        _table(case_table(report)),
        _table(perplexity_table(report)),
        _table(cost_table(report)),
        _table(layer_summary(report)),
        _bullets("Without an error of their own", unseen_sentences(report)),
        _bullets("Not compared", report.skipped),
        _bullets("Data", report.data),
        _bullets("Limits given", tuple(summary.given_limits(report))),
        _where(report.subject, report.environment, report.seconds),
    ]
    return _joined(blocks)


def render_bench_markdown(report: BenchReport) -> str:
    """The bench as Markdown, verdict first."""
    blocks = [
        _opening(report, allowances.bench_headline(report), allowances.bench_summary(report)),
        _findings(summary.bench_findings(report)),
        _table(ratio_table(report)),
        _table(difference_table(report)),
        *(_table(latency_table(workload)) for workload in report.workloads),
        _bullets("What was timed", variant_sentences(report)),
        _escaped(summary.swap_sentence(report)),
        _table(memory_table(report)),
        _bullets("Operators by provider", placement_sentences(report)),
        _bullets("Notes", report.notes),
        _where(report.subject, report.environment, report.seconds, more=against_facts(report.against)),
    ]
    return _joined(blocks)


def _joined(blocks: list[str]) -> str:
    return "\n\n".join(block for block in blocks if block) + "\n"


def _escaped(text: str) -> str:
    return _SYNTAX.sub(r"\\\1", html.escape(fmt.plain(text), quote=False))


def _opening(report: Report, headline: str, sentence: str) -> str:
    quoted = "".join(f"\n\n> **{_escaped(label)}**" for label in summary.labels(report))
    verdict = report.verdict
    return f"## {MARKS[verdict]} {headline}\n\n**{str(verdict).capitalize()}.** {_escaped(sentence)}{quoted}"


def _bullets(title: str, sentences: tuple[str, ...]) -> str:
    lines = [f"- {_escaped(sentence)}" for sentence in sentences]
    return "\n".join([f"**{title}**", "", *lines]) if lines else ""


def _findings(findings: tuple[Finding, ...]) -> str:
    return "\n".join(
        f"- {MARKS[finding.verdict]} **{_escaped(finding.name)}** ({finding.verdict}): "
        + _escaped(" ".join(finding.sentences))
        for finding in findings
    )


def _table(table: Table) -> str:
    if not table.rows:
        return ""
    table = table.narrow()
    rules = ["--:" if column.numeric else ":--" for column in table.columns]
    lines = [_line([column.title for column in table.columns]), _line(rules)]
    blank = [""] * (len(table.columns) - 1)
    for group, rows in table.groups().items():
        lines += [_line([f"*{_escaped(group)}*", *blank])] if group else []
        lines += [_line([_cell(cell) for cell in row.cells]) for row in rows]
    return "\n".join([f"**{_escaped(table.caption)}**", "", *lines])


def _cell(cell: Cell) -> str:
    if cell.verdict is not None:
        word = f"**{cell.text}**" if cell.verdict in (Verdict.FAIL, Verdict.AMBIGUOUS) else cell.text
        return f"{MARKS[cell.verdict]} {word}"
    return _escaped(cell.text)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _where(
    subject: Subject, environment: Environment, seconds: float, *, more: tuple[tuple[str, str], ...] = ()
) -> str:
    facts = [*subject_facts(subject), *more, *environment_facts(environment), ("Duration", fmt.duration(seconds))]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(environment.versions.items()))
    facts += [("Versions", versions)] if versions else []
    lines = [f"- {label}: {_escaped(value)}" for label, value in facts if value]
    return "\n".join(["<details><summary>Where</summary>", "", *lines, "", "</details>"])
