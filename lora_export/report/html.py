"""The page of a check or a bench: one self-contained file."""

from __future__ import annotations

from markupsafe import Markup

from lora_export.bench.results import BenchReport
from lora_export.check.results import CheckReport
from lora_export.report import allowances, summary
from lora_export.report import layer_tables as layers
from lora_export.report.as_json import Report
from lora_export.report.bench_plots import MOST_DOTS, latency_plot, ratio_plot
from lora_export.report.bench_tables import (
    difference_table,
    latency_table,
    memory_table,
    placement_table,
    ratio_table,
    swap_table,
)
from lora_export.report.check_plots import parity_plot
from lora_export.report.check_tables import (
    accuracy_table,
    case_tables,
    cost_table,
    limit_table,
    perplexity_table,
    rounding_table,
)
from lora_export.report.pages import page
from lora_export.report.provenance import (
    against_facts,
    environment_facts,
    pair_table,
    size_table,
    subject_facts,
)


def render_check_html(report: CheckReport) -> str:
    """The check as a page."""
    cases, measures = case_tables(report)
    return page(
        "check.html",
        **_common(report),
        headline=summary.check_headline(report),
        summary=summary.check_summary(report),
        figures=summary.check_figures(report),
        findings=summary.check_findings(report),
        plot=Markup(parity_plot(report)),
        cases=cases,
        measures=measures,
        accuracy=accuracy_table(report),
        perplexity=perplexity_table(report),
        cost=cost_table(report),
        rounding=rounding_table(report),
        limits=limit_table(report),
        reproduction=layers.reproduction_sentences(report),
        divergence_facts=layers.divergence_facts(report.divergence),
        compared=layers.divergence_table(report.divergence),
        layer_plot=Markup(layers.layer_plot(report)),
        layer_summary=layers.layer_summary(report),
        layer_tables=[layers.layer_table(entry) for entry in report.layers],
        layers_open=layers.layers_open(report),
        unseen=layers.unseen_sentences(report),
    )


def render_bench_html(report: BenchReport) -> str:
    """The bench as a page."""
    workloads = [
        (summary.workload_title(workload), Markup(latency_plot(workload, number)), latency_table(workload))
        for number, workload in enumerate(report.workloads, 1)
    ]
    samples = [len(variant.samples_ms) for workload in report.workloads for variant in workload.variants]
    return page(
        "bench.html",
        **_common(report),
        headline=allowances.bench_headline(report),
        summary=allowances.bench_summary(report),
        figures=summary.bench_figures(report),
        findings=summary.bench_findings(report),
        plot=Markup(ratio_plot(report)),
        ratios=ratio_table(report),
        workloads=workloads,
        most_dots=MOST_DOTS if max(samples, default=0) > MOST_DOTS else None,
        swap=swap_table(report),
        swap_sentence=summary.swap_sentence(report),
        memory=memory_table(report),
        memory_sentence=summary.memory_sentence(report),
        placements=placement_table(report),
        against_facts=against_facts(report.against),
        differences=difference_table(report),
    )


def _common(report: Report) -> dict[str, object]:
    return {
        "report": report,
        "verdict": report.verdict,
        "labels": summary.labels(report),
        "subject_facts": subject_facts(report.subject),
        "environment_facts": environment_facts(report.environment),
        "sizes": size_table(report.subject),
        "versions": pair_table("Versions", "Distribution", report.environment.versions),
        "settings": pair_table("Session settings", "Setting", report.environment.settings),
    }
